"""From a model folder to one whose layers of the timestep are tables over the steps of one sampler."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import qvdjax
from experiments.quantizing import check_new
from experiments.sampling.request import Settings, sampler_of
from models.pipeline import FILE, Pipeline, side_files
from qvdjax.description import weight_bytes
from qvdjax.diffusion import Solver, solver_name
from qvdjax.nn import refuse_tables

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""


def tabulate_folder(
    source: Path,
    target: Path,
    *,
    steps: int | None = None,
    solver: str | None = None,
    sigma_grid: str | None = None,
    shift: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Put tables in the place of the layers that see the timestep alone, for one sampler's timesteps.

    Where the folder has a `pipeline.json`, the new one's says this sampler, so that it is sampled with it by default.

    Args:
        source: Model folder, quantized or not.
        target: The new folder; it appears complete or not at all.
        steps, solver, sigma_grid, shift: Of the sampler; the folder's by default, as `sample_folder` takes them.
        overwrite: Replace a folder that is there already.
        progress: Called with the stage, what is done of it and its total.

    Returns:
        {solver and its fields, steps, timesteps, tables, table_bytes, replaced_bytes, weight_bytes: {before, after,
        ratio}, layers}; `tables` counts those of every block, `layers` are the rows of `qvdjax.describe`.

    Raises:
        UserError: A missing or damaged folder, one that holds tables already, a sampler that makes no sense, a
            target that is taken or cannot be written.
    """
    source, target = Path(source), Path(target)
    check_new(target, overwrite=overwrite)
    refuse_tables(models.skeleton(source), str(source), "tabulate the folder it was made from")
    chosen, count = sampler_of(source, Settings(steps=steps, solver=solver, sigma_grid=sigma_grid, shift=shift))
    timesteps = chosen.schedule(count).timesteps
    model = models.load(source, progress=progress)
    tabulated = qvdjax.tabulate(model, timesteps, sampler=_in_words(chosen, count))
    with tempfile.TemporaryDirectory() as made:
        files = _side_files(source, Path(made), chosen, count)
        models.save(tabulated, target, side_files=files, overwrite=overwrite, progress=progress)
    layers = qvdjax.describe(tabulated)
    tables = [row for row in layers if row["execution"] == "table"]
    before, after = weight_bytes(model), weight_bytes(tabulated)
    return {
        "solver": solver_name(chosen),
        **dataclasses.asdict(chosen),
        "steps": count,
        "timesteps": [float(timestep) for timestep in timesteps],
        "tables": len(tables),
        "table_bytes": sum(row["bytes"] for row in tables),
        "replaced_bytes": sum(row["replaced_bytes"] for row in tables),
        "weight_bytes": {"before": before, "after": after, "ratio": after / before},
        "layers": layers,
    }


def _in_words(solver: Solver, steps: int) -> str:
    """Such as "unipc, steps 20, shift 3.0": what somebody has to type to sample so again."""
    usual = {field.name: field.default for field in dataclasses.fields(solver)}
    fields = {key: value for key, value in dataclasses.asdict(solver).items() if key == "shift" or value != usual[key]}
    return ", ".join([solver_name(solver), f"steps {steps}", *(f"{key} {value}" for key, value in fields.items())])


def _side_files(source: Path, made: Path, solver: Solver, steps: int) -> dict[str, Path]:
    """What says how the folder is sampled: its pipeline with this sampler, or its scheduler as it is."""
    if not (source / FILE).exists():
        return side_files(source)
    fields = dataclasses.asdict(solver)
    usual = {field.name: field.default for field in dataclasses.fields(solver)}
    shift = fields.pop("shift", None)
    options = {key: value for key, value in fields.items() if value != usual[key]}
    pipeline = dataclasses.replace(
        Pipeline.load(source), solver=solver_name(solver), shift=shift, steps=steps, solver_options=options
    )
    pipeline.save(made)
    return side_files(made)
