"""What is compared on video UNets: recipes by the name of their row in the table, and what is expected of them.

All rows quantize the same layers: every convolution and linear layer but the first, the last and those that make the
time embedding. Inputs have static ranges on grids with zero points, of a layer where a method does not say otherwise
(of timesteps, of parts, of frames), and temporal features are rounded too, on a uniform grid where a method has none of
its own. `qvd-paper`, which quantizes further layers, is no row.
"""

from typing import Final

from experiments.comparison.row import Row

_ALIKE: Final = {"activation_symmetric": False, "temporal_features": "asymmetric"}

ROWS = {
    "min-max": Row("minmax", _ALIKE),
    "MSE": Row("mse", _ALIKE),
    "PTQ4DM": Row("ptq4dm", _ALIKE),
    "SmoothQuant": Row("smoothquant", {**_ALIKE, "static": True}, "static ranges, linear layers alone are scaled"),
    "Q-Diffusion": Row("q-diffusion", {"temporal_features": "asymmetric"}, "learned rounding, ranges of parts"),
    "TFMQ-DM": Row("tfmq-dm", {}, "learned rounding, ranges of timesteps"),
    "TDQ": Row("tdq", {}, "learned ranges of timesteps"),
    "TCAQ-DM": Row("tcaq-dm", {}, "learned rounding, convolutions' channels evened"),
    "MPQ-DM": Row("mpq-dm", {}, "bits shared out among channels, stored in one more; nothing trained"),
    "QVD": Row("qvd"),
    "QVD, learned rounding": Row("qvd", {"learn": True}, "as `adaround`, where the release rounds to nearest"),
    "QVD, without HTDQ": Row("qvd", {"temporal_features": "asymmetric"}, "an ablation: a uniform grid"),
    "QVD, released grid": Row("qvd", {"temporal_features": "log2"}, "temporal features as released"),
    "QVD, without the shift": Row("qvd", {"shift": False}, "an ablation of SCRI"),
    "QVD, with the scale": Row("qvd", {"scale_search": True, "thresholds": 20}, "the part of SCRI that is off"),
    "QVD, ranges of frames": Row("qvd", {"frame_ranges": True}, "as released"),
    "QVD, all steps": Row("qvd", {"statistics": "all"}, "channels' ranges over all steps, not the first"),
    "QVD, shifts of timesteps": Row("qvd", {"statistics": "step"}, "channels' ranges of each step on its own"),
    "QVD, ranges of timesteps": Row("qvd", {"step_ranges": True}, "in the place of their mean over the steps"),
    "QVD, widest of the calls": Row("qvd", {"over_calls": "widest"}, "in the place of their mean"),
    "Ours": Row("best-unet"),
    "Ours, without the scale": Row("best-unet", {"scale_alpha": None}, "the shift alone"),
}  # fmt: skip

# Row, what it is expected to be ahead of.
EXPECTED: Final = (
    ("QVD", ("min-max", "MSE", "PTQ4DM", "Q-Diffusion")),
    ("Ours", tuple(name for name in ROWS if not name.startswith(("Ours", "QVD,")))),
)
ABLATED: Final = ("QVD", "Ours")
