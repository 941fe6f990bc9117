"""How the transforms of a layer's input are fitted to a weight and to what calibration saw."""

import dataclasses

import jax
import jax.numpy as jnp

from qvdjax.nn.transforms import ChannelScale


@dataclasses.dataclass(frozen=True)
class FitChannelScale:
    """SmoothQuant's channel scale max|x|**alpha / max|w|**(1 - alpha) (Xiao et al. 2022, equation 4).

    Attributes:
        alpha: In 0..1, how much of the spread moves from the input to the weight.
        floor: Smallest maximum that counts, so that a channel that is always zero keeps a finite scale.
    """

    alpha: float
    floor: float = 1e-5

    name = ChannelScale.name

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0 to 1, not {self.alpha}")

    def fit(self, weight: jax.Array, low: jax.Array, high: jax.Array) -> ChannelScale:
        """weight [out, in] and the smallest and largest input of each channel [in] -> the transform."""
        inputs = jnp.maximum(jnp.maximum(-low, high), self.floor)
        weights = jnp.maximum(jnp.abs(weight).max(axis=0), self.floor)  # [in]
        return ChannelScale((inputs**self.alpha / weights ** (1 - self.alpha)).astype(jnp.float32))
