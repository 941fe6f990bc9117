"""What the trained methods share: learned step sizes, and dynamic input ranges with or without a learned clip."""

import dataclasses

from qvdjax.nn import InputClip
from qvdjax.recipes.method import Method
from qvdjax.recipes.training import Training


@dataclasses.dataclass(frozen=True)
class Learned(Method):
    """A method whose quantizers are trained; `qvdjax train` makes its models, `qvdjax quantize` refuses.

    Attributes:
        start: Where step sizes begin: "search" (least |error|^2.4 over 80 shrunk ranges), "minmax" or "mean".
        scaled_gradients: Gradients of scales and zero points divided by sqrt(weights x steps), as LSQ has it.
        target: "teacher", "data" or "fading"; see `qvdjax.recipes.training`.
        clip: Learned clips of input ranges: "none", "one" pair a layer, or a pair for each of `clip_count` "bins" of
            the timestep or of its "residue".
        clip_count: See `clip`.
        clip_rate: Learning rate of the clips relative to the weights'. QVGen's release: 1e-2 against 3e-5.
    """

    start: str = "search"
    scaled_gradients: bool = True
    target: str = "teacher"
    clip: str = "none"
    clip_count: int = 50
    clip_rate: float = 1.0

    def input_clip(self) -> InputClip | None:
        """How input ranges are narrowed."""
        if self.clip == "none" or self.activation() is None:
            return None
        return InputClip(self.clip, 1 if self.clip == "one" else self.clip_count)

    def training(self) -> Training:
        """The plan of `qvdjax train`."""
        return Training(self.start, self.scaled_gradients, self.target, clip_rate=self.clip_rate)
