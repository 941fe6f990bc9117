"""Plots of the report as PNG bytes. Matplotlib is driven without its global state, so it needs no display."""

import io
from collections.abc import Mapping, Sequence

# Okabe and Ito's palette: told apart by colour-blind readers; markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "os^Dv*"

Series = Mapping[str, Sequence[float]]
"""{mean, low, high, timesteps}: lists of one length."""


def error_by_step(series: Mapping[str, Series], *, title: str, label: str) -> bytes:
    """Lines of the mean over prompts at each step with their intervals as bands, on a logarithmic axis.

    Args:
        series: By candidate name, as `by_step` of metrics.json.
        title, label: Of the plot and of its vertical axis.

    Returns:
        A PNG file.
    """
    figure, axes = _figure(width=6.4, height=3.6)
    lowest = min((value for one in series.values() for value in one["mean"] if value > 0), default=1e-12)
    for index, (name, one) in enumerate(series.items()):
        steps = range(1, len(one["mean"]) + 1)
        # A logarithmic axis has no zero: equal models are drawn at the bottom of the plot.
        mean, low, high = ([max(value, lowest / 3) for value in one[key]] for key in ("mean", "low", "high"))
        color = COLORS[index % len(COLORS)]
        axes.plot(steps, mean, color=color, marker=MARKERS[index % len(MARKERS)], markersize=4, label=name)
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set(yscale="log", title=title, xlabel="sampler step", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return _png(figure)


def layer_quality(rows: Sequence[Mapping], *, title: str) -> bytes:
    """Signal-to-quantization-noise ratio of each quantized layer in the order of the table, one colour a
    role.

    Args:
        rows: {role, sqnr_db, ...} of the layers that have a ratio, as in `layers` of metrics.json; not empty.

    Returns:
        A PNG file.
    """
    figure, axes = _figure(width=6.4, height=3.6)
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
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return _png(figure)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
