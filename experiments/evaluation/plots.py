"""Plots of the report as PNG bytes."""

import math
from collections.abc import Mapping, Sequence

from experiments.figures import new_figure, png

# Okabe and Ito's palette: told apart by colour-blind readers; markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "os^Dv*P"
"""Seven beside six colours: no two of 42 lines look alike."""

Series = Mapping[str, Sequence[float]]
"""{mean, low, high}: lists of one length."""


def error_by_step(series: Mapping[str, Series], *, title: str, label: str, first_step: int) -> bytes:
    """Lines of the mean over prompts at each step with their intervals as bands, on a logarithmic axis.

    Args:
        series: By candidate name, as `by_step` of metrics.json. Errors of zero are not drawn, a
            logarithmic axis has no place for them.
        title, label: Of the plot and of its vertical axis.
        first_step: What the first entry is called on the horizontal axis.

    Returns:
        A PNG file.
    """
    figure, axes = new_figure()
    for index, (name, one) in enumerate(series.items()):
        steps = range(first_step, first_step + len(one["mean"]))
        mean, low, high = ([value or math.nan for value in one[key]] for key in ("mean", "low", "high"))
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        axes.plot(steps, mean, color=color, marker=marker, markersize=4, label=name)
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    scale = "log" if any(value > 0 for one in series.values() for value in one["mean"]) else "linear"
    axes.set(yscale=scale, title=title, xlabel="sampler step", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return png(figure)


def layer_quality(rows: Sequence[Mapping], *, title: str) -> bytes:
    """Signal-to-quantization-noise ratio of each quantized layer in the order of the table, one colour a
    role.

    Args:
        rows: {role, sqnr_db, ...} of the layers that have a ratio, as in `layers` of metrics.json; not empty.

    Returns:
        A PNG file.
    """
    figure, axes = new_figure()
    roles = list(dict.fromkeys(row["role"] for row in rows))
    for index, role in enumerate(roles):
        points = [(place, row["sqnr_db"]) for place, row in enumerate(rows) if row["role"] == role]
        axes.plot(
            *zip(*points, strict=True),
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            color=COLORS[index % len(COLORS)],
            markersize=4,
            label=role.replace("_", " "),
        )
    axes.set(title=title, xlabel="layer, in the order of the table", ylabel="weight SQNR, dB")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(frameon=False, loc="outside right upper")
    return png(figure)
