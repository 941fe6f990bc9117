"""quarot-*: rotate the inputs of products, so that no channel stands out."""

import dataclasses

from qvdjax.nn import Rotation
from qvdjax.ptq.transforms import FitRotation
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class QuaRot(Method):
    """rtn after an orthogonal transform of each input, undone in the weight (Ashkboos et al. 2024, arXiv 2404.00456).

    The transform is a Hadamard matrix behind random signs. It needs no calibration.

    Left open by the source, which rotates language models, and chosen here: the norms of a video DiT are modulated
    channel by channel and step by step, so its stream cannot be rotated as a whole; every product's input is rotated
    online. That of attention's output layers can be put into the weights of the value layers exactly, one Hadamard
    matrix a head (where the source adds one across heads, online), which is an option: it mixes heavy values into all
    rows of these weights, and each row is then rounded in their step. On the bench's model with heavy channels, one
    prediction at W4A4 was 0.68 off (squared error over squared output) with it, 0.16 without, 0.71 by rtn.
    Widths that are no powers of two are rotated by the Kronecker product with a Paley matrix, which covers the widths
    of published models; of any other width blocks are rotated, as large as there is a matrix for. All layers of one
    width share their signs. Weights are rounded to the nearest code.
    Command: `qvdjax quantize DIR OUT --recipe quarot-w4a4`.
    Expected: better than rtn where inputs have heavy channels, about equal where they have not. Published, VBench scene
    consistency of CogVideoX-2B (33.79 in full precision; S2Q-VDiT's tables): 22.97 at W4A6 and 12.21 at W4A4, against
    18.60 and 5.31 for SmoothQuant.

    Attributes:
        block: Most channels of a rotated block; none for as many as there are. Small blocks cost less and spread less.
        signs: Whether channels get random signs first.
        seed: Of the signs.
        absorb: Whether the rotation of attention's outputs is put into weights, each head's on its own; false leaves it
            online, over all heads.
    """

    block: int | None = None
    signs: bool = True
    seed: int = 0
    absorb: bool = False

    name = "quarot"

    def transform(self) -> FitRotation:
        """The rotation."""
        return FitRotation(Rotation(self.block, self.signs), self.seed, self.absorb)
