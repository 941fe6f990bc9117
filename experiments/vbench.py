"""The job of `qvdjax vbench`: the result files of VBench's program -> normalised scores and totals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvdjax.checkpoint.folder import read_json
from qvdjax.errors import UserError
from qvdjax.metrics.vbench import DIMENSIONS, vbench_scores

RESULTS = "*_eval_results.json"


def score_results(paths: Sequence[Path]) -> dict[str, Any]:
    """Read what VBench's program wrote and weigh it together.

    Args:
        paths: `<name>_eval_results.json` files, {dimension: [score, [one a video, ...]]}, or folders of such files.

    Returns:
        {files, raw, normalised, quality, semantic, total, missing, videos}: scores by dimension, None for what a
        missing dimension goes into; how many videos each dimension counts.

    Raises:
        UserError: No file; one that is damaged or of another form; a dimension that two files have.
    """
    files = [file for path in paths for file in (sorted(path.glob(RESULTS)) if path.is_dir() else [path])]
    if not files:
        raise UserError("no result of VBench is named", remedy=f"name {RESULTS} files, or a folder of them")
    raw, videos, where = {}, {}, {}
    for file in files:
        for name, result in read_json(file).items():
            dimension = name.replace(" ", "_")
            if not isinstance(result, list) or not result or dimension not in DIMENSIONS:
                raise UserError(
                    f"{file}: {name!r} is no dimension of VBench with its score", remedy="name files that VBench wrote"
                )
            if dimension in where:
                raise UserError(f"{file} and {where[dimension]} both have {dimension}", remedy="name one of them")
            raw[dimension], where[dimension] = result[0], file
            videos[dimension] = len(result[1]) if len(result) > 1 and isinstance(result[1], list) else None
    scores = vbench_scores(raw)
    return {
        "files": [str(file) for file in files],
        "raw": {name: raw[name] for name in DIMENSIONS if name in raw},
        "normalised": dict(scores.normalised),
        **scores.groups,
        "total": scores.total,
        "missing": list(scores.missing),
        "videos": {name: videos[name] for name in DIMENSIONS if name in videos},
    }
