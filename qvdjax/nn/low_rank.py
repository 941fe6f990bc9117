"""A low-rank branch in full precision beside a quantized product (SVDQuant)."""

import dataclasses

import jax
from flax import nnx

from qvdjax.nn.variables import Param, shape_of


@dataclasses.dataclass(frozen=True)
class LowRank:
    """How many directions a branch keeps out of the quantized weight.

    Attributes:
        rank: Of the branch, at most the smaller side of the weight.
        narrow_below: Layers whose smaller side is below this are narrow; 0 for none.
        narrow_rank: Of the branches of narrow layers.
    """

    rank: int = 32
    narrow_below: int = 0
    narrow_rank: int = 8

    def __post_init__(self):
        if self.rank < 1 or self.narrow_rank < 1:
            raise ValueError(f"a branch has a rank of at least 1, not {min(self.rank, self.narrow_rank)}")

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """Of a layer whose weight is [out, in]."""
        narrow = min(shape) < self.narrow_below
        return min(self.narrow_rank if narrow else self.rank, *shape)


class LowRankBranch(nnx.Module):
    """x (up down)^T, made of two thin products.

    Attributes:
        down: [rank, in]. up: [out, rank].
    """

    def __init__(self, down: jax.Array, up: jax.Array, *, axes: tuple):
        """`axes` names the two axes of the layer's weight."""
        self.down, self.up = Param(down, axes=(None, axes[1])), Param(up, axes=(axes[0], None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out], in x's type: a wider array of results would be written out and read again."""
        contract = lambda x, w: jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))  # noqa: E731
        return contract(contract(x, self.down[...]), self.up[...])

    @property
    def rank(self) -> int:
        """Directions of one layer."""
        return shape_of(self.down)[-2]
