"""tdq-*: the step of every input's grid is a learned function of the timestep."""

import dataclasses

from qvdjax.numerics import Quantizer
from qvdjax.ptq.timestep_scales import TimestepScales
from qvdjax.recipes.minmax import MinMax


@dataclasses.dataclass(frozen=True)
class TDQ(MinMax):
    """Static ranges that a small network says for each timestep (So et al., NeurIPS 2023, arXiv 2306.02316).

    Temporal dynamic quantization: the step s(t) of a layer's input is what three hidden layers of 64 make of the
    timestep's sinusoids; after training it is a table, and costs nothing. The architecture, its first values and the
    grid of inputs behind a SiLU were read in a copy of the authors' code (sally20921/LDM-Q); see
    `qvdjax.ptq.timestep_scales`. The layers that make the time embedding stay float, as there.
    Left open by what was at hand, and chosen here: networks are trained towards the least error of their layer's output
    with its input rounded (`objective=input` for the input's own), where the paper also trains them in
    quantization-aware training; for how long, how fast and on how many sinusoids; weights are rounded to nearest codes
    of searched ranges. Temporal features, one vector a step, have a range a step by nature. A call at a timestep that
    was not calibrated takes the nearest's step, where a network could be asked anew.
    Command: `qvdjax quantize DIR OUT --recipe tdq-w8a8 --calibration CALIBRATION`, calibrated with the steps that will
    be sampled with.
    Expected: about as tfmq-dm without learned rounding; steps of neighbouring timesteps are alike, which helps where
    calibration is small. Published: none for video models by itself.

    Attributes:
        objective: Of the networks, the error of the "output" or of the "input".
        iterations, rate, dropout: Of their training; Adam.
        sinusoids: Sines and cosines of the timestep together.
        candidates: Steps at which the error is measured.
        seed: Of the networks.
    """

    weight_range: str = "search"
    activation_symmetric: bool = False
    temporal_features: str = "step"
    objective: str = "output"
    iterations: int = 2000
    rate: float = 1e-3
    dropout: float = 0.2
    sinusoids: int = 64
    candidates: int = 25
    seed: int = 0

    name = "tdq"

    def __post_init__(self):
        if self.activation_symmetric:
            raise ValueError(
                "inputs that are nowhere negative have a grid of their own: leave activation_symmetric out"
            )

    def activation(self) -> Quantizer | None:
        """Static, one range a timestep."""
        tensor = super().activation()
        return tensor and dataclasses.replace(tensor, granularity="step")

    def range_search(self) -> TimestepScales:
        """The networks."""
        return TimestepScales(
            self.objective, features=self.sinusoids, iterations=self.iterations, rate=self.rate, dropout=self.dropout,
            candidates=self.candidates, seed=self.seed,
        )  # fmt: skip
