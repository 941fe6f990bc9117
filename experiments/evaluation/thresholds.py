"""Limits that a candidate must keep, for use in continuous integration."""

from collections.abc import Mapping

from qvdjax.errors import UserError

THRESHOLDS = {
    "max_teacher_forced_error": ("teacher_forced_error",),
    "max_trajectory_error": ("trajectory_error",),
    "min_psnr": ("psnr",),
    "min_ssim": ("ssim",),
    "min_color": ("oracle", "candidate", "color"),
    "min_shape": ("oracle", "candidate", "shape"),
    "min_direction": ("oracle", "candidate", "direction"),
    "max_bytes_ratio": ("weight_bytes", "ratio"),
}
"""Threshold -> where in metrics.json its value is found. `max_` and `min_` say on which side it must stay."""

VIDEO_THRESHOLDS = ("min_psnr", "min_ssim")
ORACLE_THRESHOLDS = ("min_color", "min_shape", "min_direction")


def expand(thresholds: Mapping[str, float | None] | None) -> dict[str, float]:
    """The thresholds that are set; `min_oracle` stands for all three oracle scores.

    Raises:
        UserError: An unknown name.
    """
    given = {name: float(limit) for name, limit in (thresholds or {}).items() if limit is not None}
    if "min_oracle" in given:
        limit = given.pop("min_oracle")
        given = {**dict.fromkeys(ORACLE_THRESHOLDS, limit), **given}
    if unknown := sorted(set(given) - set(THRESHOLDS)):
        known = ", ".join([*THRESHOLDS, "min_oracle"])
        raise UserError("there is no such threshold", remedy=f"use one of {known}", items=unknown)
    return given


def check_measurable(thresholds: Mapping[str, float], *, oracle_reason: str | None, video_reason: str | None) -> None:
    """Refuse thresholds on what this evaluation will not measure, before it runs.

    Args:
        oracle_reason, video_reason: Why there are no oracle scores or no videos; None if there will be some.

    Raises:
        UserError: As said.
    """
    for reason, names in ((video_reason, VIDEO_THRESHOLDS), (oracle_reason, ORACLE_THRESHOLDS)):
        if reason and (wanted := [name for name in names if name in thresholds]):
            raise UserError(f"thresholds cannot be checked: {reason}", remedy="drop them", items=wanted)


def failures(thresholds: Mapping[str, float], metrics: Mapping) -> list[str]:
    """One line for each threshold whose mean is on the wrong side; equality passes."""
    lines = []
    for name, limit in thresholds.items():
        value = metrics
        for key in THRESHOLDS[name]:
            value = value[key]
        value = value["mean"] if isinstance(value, Mapping) else value
        missed = value > limit if name.startswith("max_") else value < limit
        if missed:
            side = "above" if name.startswith("max_") else "below"
            lines.append(f"{'.'.join(THRESHOLDS[name])} is {value:.4g}, {side} the threshold {name} = {limit:g}")
    return lines
