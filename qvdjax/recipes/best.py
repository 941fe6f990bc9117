"""best-* and best-unet-*: our own recipes, of what measured best."""

import dataclasses

from qvdjax.recipes.flatquant import FlatQuant
from qvdjax.recipes.qvd import QVD


@dataclasses.dataclass(frozen=True)
class Best(FlatQuant):
    """flatquant whose inputs are centred and whose weights are fitted to inputs as they are rounded: our own.

    At 4 bits nearly all of a learned recipe's error comes from the inputs of products, not from weights: with
    `s2q-vdit` on the bench, inputs left float take six sevenths of it away, weights of 8 bits one fifth (prompts that
    no table uses; two epochs). More than half of most inputs there is the same for all tokens of a sample, so that is
    taken off and multiplied by itself (`centered`). What rounding hides of the rest is known from calibration, and the
    weight that expects it is found by least squares before it is rounded (`rounded_inputs`, over the whole calibration
    set). Behind learned matrices both sides are nearly normal, and codes stand for the levels of least error for that
    (`codebook`). Nothing is added to the weights' bytes, and to the products one row a sample.

    What S2Q-VDiT adds to FlatQuant is left out: selected samples and weighed tokens were no gain on the bench. Nor were
    propagated inputs, zero points, or all blocks trained together.
    Command: `qvdjax quantize DIR OUT --recipe best-w4a4 --calibration CALIBRATION`.
    Expected: the least error of all recipes at the same bits (docs/results). Published: none.
    """

    codebook: str | None = "gaussian"
    rounded_inputs: bool = True
    centered: bool = True

    name = "best"
    calibrates_on_all = True


@dataclasses.dataclass(frozen=True)
class BestUNet(QVD):
    """qvd for video UNets, whose ranges clip nothing and know the timestep: our own.

    On the bench most of what `qvd` loses comes from ranges that are means over calls. Here an input has one for each
    timestep of the calibration set, the widest of its calls. Channels are shifted and then divided by SmoothQuant's
    scale, both from all steps: at W6A6 the scale takes 29 % of the error away (prompts that no table uses, nearest
    rounding). Temporal features have a range for each timestep too, and weights learn their rounding.
    Command: `qvdjax quantize DIR OUT --recipe best-unet-w6a6 --calibration CALIBRATION`.
    Expected: the least error of the recipes for UNets at 6 bits, where `mpq-dm`, whose codes take a bit more, is next;
    at 8 level with `mpq-dm`, and without heavy channels with `smoothquant` (docs/results).
    Published: none.
    """

    statistics: str = "all"
    scale_alpha: float | None = 0.5
    step_ranges: bool = True
    over_calls: str = "widest"
    temporal_features: str = "step"
    learn: bool = True

    name = "best-unet"
