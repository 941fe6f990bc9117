"""ptq4dm-*: static ranges from steps drawn from a normal distribution."""

import dataclasses

from qvdjax.calibration.timestep_draw import TimestepDraw
from qvdjax.recipes.mse import MSE
from qvdjax.recipes.rules import Recipe


@dataclasses.dataclass(frozen=True)
class PTQ4DM(MSE):
    """As mse, calibrated at steps drawn from a normal distribution that leans towards the finished video (Shang et al.,
    CVPR 2023, arXiv 2211.15736).

    What the source contributes is the calibration set: each input is at a step of its own, drawn from
    N(0.4 T, (0.4 T)^2) (42Shawn/PTQ4DM at 180a4d1).
    Left open or not followed, and chosen here: ranges of least squared error; inputs are drawn from the trajectories of
    a calibration set, with both guidance branches, since video models are conditional; 128 of them, where the release
    takes 1024 images (`samples=1024`); the release ends with 100 iterations of QDrop's block reconstruction, which is
    left out.
    Command: `qvdjax quantize DIR OUT --recipe ptq4dm-w8a8 --calibration CALIBRATION`.
    Expected: about as mse, nearer to the full-precision model late in sampling and further from it early. Published:
    none for video models by itself; QVD's code descends from its.

    Attributes:
        samples: Inputs that are drawn; each counts twice, with the prompt and with the negative prompt.
        step_mean, step_deviation: Of the distribution, as shares of the number of steps; 0 is the finished video.
        seed: Of the draw.
    """

    samples: int = 128
    step_mean: float = 0.4
    step_deviation: float = 0.4
    seed: int = 0

    name = "ptq4dm"

    def recipe(self) -> Recipe:
        """mse's, on drawn inputs."""
        draw = TimestepDraw(self.samples, self.step_mean, self.step_deviation, self.seed)
        return dataclasses.replace(super().recipe(), draw=draw)
