"""dsaquant-*: learned step sizes, the teacher fading into the data as noise vanishes (arXiv 2609.04031)."""

import dataclasses

from qvdjax.nn import LayerScheme
from qvdjax.recipes.learned import Learned
from qvdjax.recipes.rules import Recipe, Rule
from qvdjax.recipes.training import Training


@dataclasses.dataclass(frozen=True)
class DSAQuant(Learned):
    """DSAQuant: a loss that follows the teacher at much noise and the data at little, no auxiliary module.

    At noise level s (1 is noise) the teacher's share is (e^(a s) - 1) / (e^a - 1) with a = 5. Layers that see the
    timestep alone stay float; after training `qvdjax tabulate` makes them tables over the sampler's steps, as the paper
    does, which are smaller than their weights. Left open by the source, and chosen here: step sizes of weights start
    by search; input ranges come as they are (the kernel's constant clip of 0.95 is not said to be in training).
    Commands: `qvdjax train DIR OUT --recipe dsaquant-w4a4 --data DATA`, `qvdjax tabulate OUT TABLES --steps 50`, then
    `qvdjax sample TABLES --steps 50 --guidance-until 400`.
    Published (VBench, mean of eight, Wan 2.1 1.3B W4A4): 67.21 against 66.28 in bfloat16, with guidance left out of the
    last nine of fifty steps; 65.1 for its loss towards the teacher alone, with guidance throughout.

    Attributes:
        fading: a of the loss; the paper compares linear, 1, 5 (best) and 10.
    """

    target: str = "fading"
    fading: float = 5.0

    name = "dsaquant"

    def recipe(self) -> Recipe:
        """The common rules, and before them the layers of the timestep."""
        plain = super().recipe()
        reason = "it sees the timestep alone: a table over the sampler's steps is smaller than its weights"
        table = Rule(LayerScheme(reason=reason), roles=("modulation", "temporal_feature"))
        skipped = tuple(rule for rule in plain.rules if rule.path)
        return dataclasses.replace(plain, rules=(*skipped, table, *plain.rules[len(skipped) :]))

    def training(self) -> Training:
        """Learned quantizers, the mixed loss."""
        return dataclasses.replace(super().training(), fading=self.fading)
