"""What a quantized folder says about its reconstruction: errors of blocks, and which inputs were selected."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.figures import new_figure, png
from qvdjax.calibration.selection import SelectedInputs
from qvdjax.ptq.reconstruction import BlockReport

RECORD, PLOT = "reconstruction.json", "selection.png"


def reconstruction_record(blocks: Sequence[BlockReport], selected: SelectedInputs | None) -> dict[str, Any]:
    """`blocks`, and of a selection `candidates` with their scores and whether each was `chosen`."""
    record: dict[str, Any] = {"blocks": [dataclasses.asdict(block) for block in blocks]}
    return record if selected is None else {**record, "candidates": selected.table()}


def record_files(record: dict[str, Any]) -> dict[str, bytes]:
    """The record and, of a selection, its plot, for the model's folder."""
    files = {RECORD: json.dumps(record, indent=1).encode()}
    return {**files, PLOT: selection_plot(record["candidates"])} if "candidates" in record else files


def selection_plot(candidates: Sequence[dict[str, Any]]) -> bytes:
    """Prompts by steps, the darker the higher the score; what was chosen is marked. A PNG file."""
    scores = np.full([1 + max(row[key] for row in candidates) for key in ("sample", "step")], np.nan)
    for row in candidates:
        scores[row["sample"], row["step"]] = row["score"]
    figure, axes = new_figure()
    axes.grid(visible=False)
    image = axes.imshow(scores, cmap="Blues", aspect="auto", interpolation="nearest")
    chosen = [(row["step"], row["sample"]) for row in candidates if row["chosen"]]
    axes.plot(*zip(*chosen, strict=True), linestyle="none", marker="o", markersize=5, color="#D55E00", label="chosen")
    axes.set(xlabel="sampler step", ylabel="prompt", title=f"{len(chosen)} of {len(candidates)} candidates")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="score")
    figure.legend(frameon=False, loc="outside lower right")
    return png(figure)
