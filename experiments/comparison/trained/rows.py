"""What is compared: recipes by the name of their row in the table."""

from experiments.comparison.row import Row

RANK = 8  # of Phi and adapters: the bench's layers are 128 wide, where 32 directions would be a quarter of a weight


_PHI = {"rank": RANK}
ROWS = {
    "straight-through": Row("rtn", note="ranges follow the values"),
    "LSQ": Row("lsq"),
    "Q-DM": Row("q-dm"),
    "EfficientDM": Row("efficientdm", {"rank": RANK}),
    "QVGen, Phi kept": Row("qvgen", {**_PHI, "phases": "keep"}, "an ablation: its model cannot be stored"),
    "QVGen, single decay": Row("qvgen", {**_PHI, "phases": "single"}),
    "QVGen": Row("qvgen", _PHI),
    "QVGen without Phi": Row("qvgen", {"rank": 0}, "the same clips and rates"),
    "DSAQuant": Row("dsaquant"),
    "QVGen, DSAQuant's loss": Row("qvgen", {**_PHI, "target": "fading"}, "the two together"),
}
