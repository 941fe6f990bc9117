"""What layers get of their inputs once these are rounded: the moments that a weight is fitted to."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qvdjax.calibration.moments import summed
from qvdjax.calibration.watching import Watcher
from qvdjax.nn import Linear, QuantizedLinear, Statistic, VideoModel, swap_layers
from qvdjax.nn.variables import shape_of
from qvdjax.ptq.apply import stacked_rows
from qvdjax.ptq.gptq import RoundedInputs
from qvdjax.ptq.layers import quantize_layer

_HIGHEST = jax.lax.Precision.HIGHEST


class RoundedMoments(Watcher):
    """A linear layer that keeps what `RoundedInputs` holds, of its last call.

    Attributes:
        quantized: The layer as quantized, which says how its input is transformed and rounded.
        moment, cross: [in, in] float32, summed over all tokens.
    """

    def __init__(self, layer: Linear, quantized: QuantizedLinear):
        super().__init__(layer)
        self.quantized = quantized
        *leading, _, width = shape_of(layer.weight)
        self.moment, self.cross = (
            Statistic(jnp.zeros((*leading, width, width), jnp.float32), axes=(None, None)) for _ in range(2)
        )

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        transform = self.quantized.transform
        exact = x if transform is None else transform(x)
        exact, rounded = (
            a.reshape(-1, a.shape[-1]).astype(jnp.float32)  # [..., in] -> [tokens, in]
            for a in (exact, self.quantized.rounded_input(x))
        )
        self.moment[...] = jnp.matmul(rounded.T, rounded, precision=_HIGHEST)
        self.cross[...] = jnp.matmul(rounded.T, exact, precision=_HIGHEST)


def rounded_inputs(
    model: VideoModel, batches: Iterable[Mapping[str, jax.Array]], names: Collection[str],
    schemes: Mapping[str, Any], made: Callable[[str], Mapping[str, Any]],
) -> Iterator[tuple[str, RoundedInputs]]:  # fmt: skip
    """Moments of the rounded inputs of some layers, summed over the tokens of all batches.

    The model meets them in full precision, so that what a layer's own input loses is all that is lost.

    Args:
        model: A float model, left as it is.
        batches: Keyword arguments of the model's call.
        names: Of linear layers in diffusers; the moments of all of them are in memory at once.
        schemes: One a layer and block, by name in diffusers.
        made: A layer's arrays by its name (`qvdjax.ptq.layers.quantized_arrays`), of which its weight is not read.

    Yields:
        Name and moments.

    Raises:
        UserError: See `qvdjax.calibration.moments.summed`.
    """

    def watcher(layer, scheme, found):
        # The weight's quality is a statistic too, but none of the calls'.
        arrays = stacked_rows(layer, [{**made(name), "weight_sqnr_db": None} for name in found])
        return RoundedMoments(layer, quantize_layer(layer, scheme, execution="simulate", arrays=arrays))

    watched = swap_layers(model, {name: schemes[name] for name in names}, watcher)
    for name, kept in summed(watched, batches):
        yield name, RoundedInputs(**kept)
