"""What is compared on transformers: recipes by the name of their row in the table, and what is expected of them."""

from typing import Final

from experiments.comparison.row import Row

ROWS = {
    "RTN": Row("rtn"),
    "SmoothQuant": Row("smoothquant"),
    "QuaRot": Row("quarot"),
    "ViDiT-Q": Row("vidit-q"),
    "ViDiT-Q, two intervals": Row(
        "vidit-q", {"timestep_intervals": 2}, "scales and codes for timesteps to 500 and above"
    ),
    "GPTQ": Row("gptq"),
    "GPTQ, rotated": Row("gptq", {"rotation": True}, "the rotation of QuaRot before it"),
    "AdaRound": Row("adaround"),
    "PTQ4DiT": Row("ptq4dit"),
    "PTQ4DiT, paper": Row(
        "ptq4dit", {"static": True, "attention_pv_bits": 8}, "one input range a layer, softmax and values at 8 bits"
    ),
    "SVDQuant": Row("svdquant", {"rank": 8}, "rank 8: the bench's layers are 128 wide"),
    "Q-DiT": Row("q-dit", {"group_size": 64, "activation_group_size": 64}, "groups of 64 channels"),
    "DVD-Quant": Row("dvd-quant", {"activation_group_size": 64}, "groups of 64 channels, the same bits at all steps"),
    "DVD-Quant, switching": Row(
        "dvd-quant", {"activation_group_size": 64, "switch": 0.1}, "inputs of 8 bits where predictions change"
    ),
    "OrbitQuant": Row("orbitquant"),
    "FlatQuant": Row("flatquant"),
    "Q-VDiT": Row("q-vdit"),
    "Q-VDiT, paper": Row("q-vdit", {"feed_forward_bits": 8}, "feed-forward layers at 8 bits, as released"),
    "Q-VDiT, frames apart": Row("q-vdit", {"temporal": 0.0}, "an ablation of the loss between frames"),
    "S2Q-VDiT": Row("s2q-vdit"),
    "S2Q-VDiT, random samples": Row("s2q-vdit", {"select": "random"}, "an ablation of the selection"),
    "S2Q-VDiT, difference alone": Row("s2q-vdit", {"select": "difference"}, "samples by how much a step changes"),
    "S2Q-VDiT, quantization alone": Row("s2q-vdit", {"select": "quantization"}, "samples by the size of the Hessian"),
    "S2Q-VDiT, whole prompts": Row("s2q-vdit", {"select": "prompts"}, "all steps of two prompts"),
    "S2Q-VDiT, 20 samples": Row("s2q-vdit", {"samples": 20}, "half the data"),
    "S2Q-VDiT, 80 samples": Row("s2q-vdit", {"samples": 80}, "twice the data"),
    "S2Q-VDiT, least weight 0.2": Row("s2q-vdit", {"least_weight": 0.2}, "lambda_min, 0.5 as published"),
    "S2Q-VDiT, least weight 0.8": Row("s2q-vdit", {"least_weight": 0.8}, "lambda_min"),
    "S2Q-VDiT, tokens alike": Row("s2q-vdit", {"token_weights": "none"}, "an ablation of the token weights"),
    "S2Q-VDiT, percentiles": Row("s2q-vdit", {"token_weights": "percentile"}, "token weights by rank"),
    "S2Q-VDiT, codebook": Row("s2q-vdit", {"codebook": "gaussian"}, "OrbitQuant's levels behind learned transforms"),
    "S2Q-VDiT, propagated": Row("s2q-vdit", {"inputs": "propagated"}, "blocks meet the errors of those before"),
    "S2Q-VDiT, centred": Row("s2q-vdit", {"centered": True}, "the mean of tokens apart"),
    "Ours": Row("best"),
    "Ours, not centred": Row("best", {"centered": False}, "an ablation of what most of it is"),
    "Ours, even grid": Row("best", {"codebook": None}, "an ablation of the codebook"),
    "Ours, exact inputs": Row("best", {"rounded_inputs": False}, "an ablation of the fit to rounded inputs"),
}

# Row, what it is expected to be ahead of (the paper's tables).
EXPECTED: Final = (
    ("S2Q-VDiT", ("RTN", "SmoothQuant", "QuaRot", "ViDiT-Q")),
    ("Ours", tuple(name for name, row in ROWS.items() if row.method not in ("best", "s2q-vdit")) + ("S2Q-VDiT",)),
)
ABLATED: Final = ("S2Q-VDiT", "Ours")  # what the rows of their names with a comma leave out, or do otherwise
