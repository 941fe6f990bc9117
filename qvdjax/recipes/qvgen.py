"""qvgen-*: learned quantizers with an auxiliary module that lowers the gradients and decays away (arXiv 2505.11497)."""

import dataclasses

from qvdjax.nn import LayerScheme
from qvdjax.recipes.learned import Learned
from qvdjax.recipes.rules import Recipe, Rule
from qvdjax.recipes.training import Auxiliary, Training


@dataclasses.dataclass(frozen=True)
class QVGen(Learned):
    """QVGen: W_q x_q + Phi x_q while training, Phi of low rank and faded out by rank decay; nothing of it remains.

    Quantized are the layers, and on the grids, that every preset of this library quantizes, so that its rows compare
    with the other methods'. `qvgen-paper` and `qvgen-code` have the sources' own choices.
    Left open by the source, and chosen here: one learned clip a layer (the release's 50 do not tell noise levels
    apart), trained at the weights' rate times `clip_rate`; at a phase's start the optimizer's moments follow.
    Command: `qvdjax train DIR OUT --recipe qvgen-w4a4 --data DATA`; on layers as narrow as the bench's `--set rank=8`.
    Published (VBench, mean of eight, Wan 2.1 1.3B W4A4): 62.90 for the released checkpoint, 63.56 trained anew by
    DSAQuant's authors, against 66.28 in bfloat16.

    Attributes:
        rank: Directions of Phi at the start; 0 for no Phi at all.
        phases: "paper" (five phases from rank 32), "code" (six), "single" (all at once) or "keep" (never fades: an
            ablation, its model cannot be stored as a quantized one).
        keep: Part of the directions that survives a phase.
        shape: Of the fading: "cosine", "linear", "quadratic" or "cubic".
        phi_start: "svd", "zeros" or "random".
        phi_warm_up: Steps before the first phase.
        second_moments: "follow" or "reset" at a phase's start.
    """

    clip: str = "one"
    clip_rate: float = 333.0  # the release's 1e-2 against 3e-5
    rank: int = 32
    phases: str = "paper"
    keep: float = 0.5
    shape: str = "cosine"
    phi_start: str = "svd"
    phi_warm_up: int = 0
    second_moments: str = "follow"

    name = "qvgen"

    def training(self) -> Training:
        """Learned quantizers, and Phi."""
        auxiliary = None
        if self.rank:
            auxiliary = Auxiliary(
                self.rank, self.phi_start, self.phases, self.keep, self.shape, self.phi_warm_up, self.second_moments
            )
        return dataclasses.replace(super().training(), auxiliary=auxiliary)


@dataclasses.dataclass(frozen=True)
class QVGenPaper(QVGen):
    """QVGen with the paper's grids: asymmetric weights a channel and inputs a token, otherwise as `qvgen`.

    Command: `qvdjax train DIR OUT --recipe qvgen-paper-w4a4 --data DATA`. Published: see `qvgen`.
    """

    weight_symmetric: bool = False
    activation_symmetric: bool = False

    name = "qvgen-paper"


@dataclasses.dataclass(frozen=True)
class QVGenCode(QVGenPaper):
    """QVGen as its release computes (ModelTC/QVGen at 198e761, `training/quant/quant.py` and its W4A4 scripts).

    Against `qvgen-paper`: six phases down to one direction, 50 clips a layer chosen by the timestep's residue, and
    every linear layer quantized, also those of the timestep, the text and the output; patches stay float. Not copied,
    because they are slips: the batch's first timestep for all samples, counting calls when sampling, and optimizer
    moments left in the old basis.
    Command: `qvdjax train DIR OUT --recipe qvgen-code-w4a4 --data DATA`. Published: see `qvgen`.
    """

    phases: str = "code"
    clip: str = "residue"

    name = "qvgen-code"

    def recipe(self) -> Recipe:
        """One rule for every linear layer."""
        scheme = LayerScheme(
            self.weight(), self.activation(), (), "the release quantizes every linear layer", self.input_clip()
        )
        plain = super().recipe()
        kept = tuple(rule for rule in plain.rules if rule.path or rule.roles == ("attention",))
        patches = Rule(
            LayerScheme(reason="the embedding of patches stays float"), path=r"patch_embedding|patch_embed\.proj"
        )
        return dataclasses.replace(plain, rules=(*kept, patches, Rule(scheme)))
