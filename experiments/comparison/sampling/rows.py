"""What is compared: ways of sampling a model, by the name of their row in the table."""

import dataclasses
from typing import Any, Final

import qvdjax
from experiments.sampling.running import precise_of
from qvdjax import recipes
from qvdjax.nn import VideoModel

_ATTENTION: Final = {"attention_qk_bits": 8, "attention_pv_bits": 8}


@dataclasses.dataclass(frozen=True)
class SamplingRow:
    """One way of sampling one model.

    Attributes:
        bits: Of weights and activations of all rows of one name up to the comma, rounded to nearest, with attention of
            8 bits; None for full precision.
        guidance_until: Timestep below which steps are not guided.
        one_batch: Both branches of the guidance as one batch.
        float_attention: So many first and last steps leave attention in full precision.
        tables: Layers of the timestep alone become tables over the steps.
        note: What the row is there for.
    """

    bits: str | None = None
    guidance_until: float = 0.0
    one_batch: bool = False
    float_attention: tuple[int, int] = (0, 0)
    tables: bool = False
    note: str = ""

    def model(self, whole: VideoModel, timesteps: Any) -> VideoModel:
        """What is sampled, made of the full-precision model; `timesteps` are those that the sampler visits."""
        model = whole
        if self.bits is not None:
            model = qvdjax.quantize(whole, recipes.get(f"rtn-{self.bits}", **_ATTENTION), None)
        return qvdjax.tabulate(model, timesteps) if self.tables else model

    def arguments(self, model: VideoModel) -> dict[str, Any]:
        """What `qvdjax.diffusion.sample` is told beside what all rows have in common."""
        precise = precise_of(model, self.float_attention)
        return {"guidance_until": self.guidance_until, "doubled_batch": self.one_batch, "precise": precise}


def _ways(bits: str | None = None) -> dict[str, SamplingRow]:
    """The rows that float and quantized models have alike, by what comes behind the comma."""
    return {
        "": SamplingRow(bits),
        "one batch": SamplingRow(bits, one_batch=True, note="both branches of the guidance at once"),
        "tables": SamplingRow(bits, tables=True, note="layers of the timestep alone are looked up"),
        **{f"guided until {last}": SamplingRow(bits, guidance_until=float(last)) for last in (400, 600, 800)},
    }


# Of twenty steps: as many as five and two of fifty.
_ENDS: Final = {"float attention first and last": SamplingRow("w8a8", float_attention=(2, 1), note="2 and 1 steps")}

REFERENCE: Final = "full precision"
ROWS: Final = {
    ", ".join(filter(None, (name, way))): row
    for name, ways in {
        REFERENCE: _ways(), "W8A8": _ways("w8a8") | _ENDS, "W4A4": _ways("w4a4"),
    }.items()
    for way, row in ways.items()
}  # fmt: skip
