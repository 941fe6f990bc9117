"""The report: one HTML page that needs neither the network nor other files."""

import importlib.resources
from collections.abc import Mapping, Sequence

from experiments.evaluation import sections
from experiments.evaluation.markup import Markup, element, join
from experiments.evaluation.sections import Clip

PLAY_ALL = """
const clips = [...document.querySelectorAll("video")], button = document.getElementById("play");
const show = () => { button.textContent = clips.some(c => !c.paused) ? "Pause all" : "Play all"; };
button.onclick = () => {
  const play = clips.every(c => c.paused);
  clips.forEach(c => { if (play) { c.currentTime = 0; c.play(); } else c.pause(); });
};
clips.forEach(c => { c.onplay = c.onpause = show; });
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) clips.forEach(c => c.play());
"""


def render(metrics: Mapping[str, Mapping], clips: Sequence[Clip], paired: Sequence[Mapping]) -> str:
    """The whole page.

    Args:
        metrics: metrics.json of each candidate, by the name to show; all against one reference. Not empty.
        clips: Videos, each with panels in the order reference, then `metrics`.
        paired: See `summary.paired_entries`.
    """
    first = next(iter(metrics.values()))
    names = ", ".join(metrics)
    head = join(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"{names} against {first['reference']['name']}"),
        element("style", Markup(importlib.resources.files(__package__).joinpath("report.css").read_text())),
    )
    body = element(
        "main",
        element("h1", f"{names} against {first['reference']['name']}"),
        element("p", _sampling_line(first), class_="soft"),
        *(_verdict(name, one) for name, one in metrics.items() if one["thresholds"]),
        sections.overview(metrics),
        sections.videos([f"{first['reference']['name']} (reference)", *metrics], clips),
        sections.error_by_step(metrics),
        sections.paired_differences(paired),
        sections.speed_ceiling(first["ceiling"]),
        *(sections.candidate(name, one) for name, one in metrics.items()),
        sections.provenance(first),
    )
    script = element("script", Markup(PLAY_ALL)) if clips else ""
    return f'<!doctype html>\n<html lang="en">{element("head", head)}{element("body", body, script)}</html>\n'


def _sampling_line(metrics: Mapping) -> str:
    sampling = metrics["sampling"]
    return (
        f"{len(sampling['prompts'])} prompts, {len(sampling['samples'])} videos a model from the same noise, "
        f"{sampling['steps']} steps of {sampling['solver']['name']}, "
        f"guidance scale {sampling['guidance_scale']:g}."
    )


def _verdict(name: str, metrics: Mapping) -> Markup:
    if metrics["passed"]:
        return element("p", f"{name} keeps its thresholds.", class_="verdict good")
    lines = element("ul", *(element("li", line) for line in metrics["failures"]))
    return element("div", element("strong", f"{name} misses a threshold"), lines, class_="verdict bad")
