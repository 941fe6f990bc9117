"""The sections of the report, each a function of metrics.json (one candidate's, or several by name)."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.evaluation import plots
from experiments.evaluation.markup import Markup, element, image, join, table, video

ABOUT_ERRORS = (
    "Brackets are 95 % bootstrap intervals over prompts. The teacher-forced error is the relative squared "
    "error of the guided prediction when both models are given the reference's latents, averaged over steps "
    "and prompts: the error of quantization alone. All other measures follow each model along its own "
    "latents. At four bits and below the paths part, so a low PSNR need not mean a bad video: look at the "
    "videos too."
)
ABOUT_STEADINESS = "Steadiness is VBench's temporal flickering score; 1 is a still picture."
ABOUT_ORACLE = "Colour, shape and direction: the share of videos in which the oracle sees what the prompt says."


@dataclasses.dataclass(frozen=True)
class Clip:
    """One prompt at one seed: the reference's video and every candidate's, side by side in one mp4 file."""

    prompt: str
    seed: int
    mp4: bytes


def overview(metrics: Mapping[str, Mapping]) -> Markup:
    """The table that says it all, one row a model."""
    first = next(iter(metrics.values()))
    name = first["reference"]["name"]
    header = ["model", "weights", "of reference", "teacher-forced error", "error of final latents"]
    rows = [[name, _bytes(first["weight_bytes"]["reference"]), "1", "0", "0"]]
    for candidate_name, one in metrics.items():
        bytes_, ratio = one["weight_bytes"]["candidate"], one["weight_bytes"]["ratio"]
        errors = [_interval(one[measure], 2) for measure in ("teacher_forced_error", "trajectory_error")]
        rows.append([candidate_name, _bytes(bytes_), f"{ratio:.3f}", *errors])
    notes = [ABOUT_ERRORS, f"Bytes count codes at their logical bits; {name} is stored as {_types(first)}."]
    if first["psnr"]:
        header += ["PSNR, dB", "SSIM", "steadiness"]
        rows[0] += ["", "", _interval(first["flicker"]["reference"])]
        for row, one in zip(rows[1:], metrics.values(), strict=True):
            row += [_interval(entry) for entry in (one["psnr"], one["ssim"], one["flicker"]["candidate"])]
        notes.append(ABOUT_STEADINESS)
    else:
        notes.append(f"No measures of videos: {first['video_reason']}.")
    if first["oracle"]:
        header += ["colour", "shape", "direction"]
        scores = [first["oracle"]["reference"], *(one["oracle"]["candidate"] for one in metrics.values())]
        for row, score in zip(rows, scores, strict=True):
            row += [_interval(score[name], 2) for name in ("color", "shape", "direction")]
        notes.append(ABOUT_ORACLE)
    else:
        notes.append(f"No oracle scores: {first['oracle_reason']}.")
    paragraphs = (element("p", note, class_="soft") for note in notes)
    return _section("What was lost and what was saved", table(header, rows, caption="All models"), *paragraphs)


def videos(labels: Sequence[str], clips: Sequence[Clip]) -> Markup:
    """The videos with a button that starts them together; `labels` name the panels from left to right."""
    if not clips:
        return Markup("")
    figures = [
        element(
            "figure",
            video(clip.mp4, f"{clip.prompt}; from left to right: {', '.join(labels)}"),
            element("figcaption", f"{clip.prompt} (seed {clip.seed})"),
        )
        for clip in clips
    ]
    return _section(
        "Videos",
        element("p", element("button", "Play all", id="play", type="button")),
        element("div", *figures, class_="clips wide" if len(labels) > 2 else "clips"),
    )


def error_by_step(metrics: Mapping[str, Mapping]) -> Markup:
    """Two plots, and the numbers of the first as a table."""
    pictures = []
    for measure, title, label, first_step in (
        ("teacher_forced_error", "At the reference's latents", "relative squared error of the prediction", 1),
        ("trajectory_error", "Along each model's own path", "relative squared error of the latents", 0),
    ):
        series = {name: one[measure]["by_step"] for name, one in metrics.items()}
        ends = "; ".join(f"{name} ends at {one['mean'][-1]:.2g}" for name, one in series.items())
        png = plots.error_by_step(series, title=title, label=label, first_step=first_step)
        pictures.append(image(png, f"{title}: {label}, by step. {ends}."))
    steps = [one["teacher_forced_error"]["by_step"] for one in metrics.values()]
    rows = [
        [step + 1, f"{timestep:.0f}", *(f"{one['mean'][step]:.3g}" for one in steps)]
        for step, timestep in enumerate(steps[0]["timesteps"])
    ]
    numbers = table(["step", "timestep", *metrics], rows, caption="Teacher-forced error, mean over prompts")
    return _section(
        "Error by step",
        element("div", *pictures, class_="plots"),
        element("details", element("summary", "The numbers"), numbers),
    )


def paired_differences(paired: Sequence[Mapping]) -> Markup:
    """Every pair of candidates; nothing where there is one candidate."""
    if not paired:
        return Markup("")
    rows = []
    for row in paired:
        interval = f"[{row['low']:.3g}, {row['high']:.3g}]"
        names = f"{row['first']} minus {row['second']}"
        measure = row["measure"].replace("_", " ")
        rows.append([names, measure, f"{row['mean']:.3g}", interval, "yes" if row["excludes_zero"] else "no"])
    header = ["candidates", "measure", "mean difference", "95 % interval", "excludes zero"]
    return _section("Candidates compared, prompt by prompt", table(header, rows, caption="Paired differences"))


def speed_ceiling(ceiling: Mapping) -> Markup:
    """What quantized linear layers can gain at most; see `ceiling.speed_ceiling`."""
    most = "without bound" if ceiling["ceiling"] is None else f"{ceiling['ceiling']:.2f} times"
    note = (
        f"At this size {_percent(ceiling['linear_share'])} of the multiplications are in linear layers, "
        f"{_percent(ceiling['attention_share'])} in attention and "
        f"{_percent(ceiling['convolution_share'])} in convolutions. Linear layers at twice the speed, as "
        "int8 against bfloat16 on most accelerators, make a step at most "
        f"{ceiling['ceiling_int8']:.2f} times faster; linear layers that take no time at all, {most}. "
        "Nothing on this page was timed; qvdjax bench does that."
    )
    return _section("How fast it could become", element("p", note))


def candidate(name: str, metrics: Mapping) -> Markup:
    """Layers and prompts of one candidate."""
    quality = [row for row in metrics["layers"] if row["sqnr_db"] is not None]
    picture = Markup("")
    if quality:
        worst = min(quality, key=lambda row: row["sqnr_db"])
        alt = f"Weight SQNR of {len(quality)} layers; lowest {worst['sqnr_db']:.1f} dB in {worst['path']}"
        png = plots.layer_quality(quality, title=f"Quantized weights of {name}")
        picture = element("div", image(png, alt), class_="plots")
    header = ["layer", "role", "shape", "weight bits", "activation bits", "bytes", "SQNR, dB", "why"]
    layers = table(header, [_layer(row) for row in metrics["layers"]], caption=f"Layers of {name}", class_="layers")
    measures = ["teacher_forced_error", "trajectory_error", *(["psnr", "ssim"] if metrics["psnr"] else [])]
    prompts = table(
        ["prompt", *(measure.replace("_", " ") for measure in measures)],
        [
            [prompt, *(f"{metrics[measure]['per_prompt'][index]:.4g}" for measure in measures)]
            for index, prompt in enumerate(metrics["sampling"]["prompts"])
        ],
        caption="Each prompt, mean over its seeds",
    )
    return _section(
        f"{name} in detail",
        picture,
        element("details", element("summary", f"{len(metrics['layers'])} layers"), layers),
        element("details", element("summary", f"{len(metrics['sampling']['prompts'])} prompts"), prompts),
    )


def provenance(metrics: Mapping) -> Markup:
    """Device, versions, settings, command."""
    device, sampling = metrics["device"], metrics["sampling"]
    solver = ", ".join(f"{key} {value}" for key, value in sampling["solver"].items())
    versions = (f"{name} {version or 'not installed'}" for name, version in metrics["versions"].items())
    facts = {
        "Device": f"{device['count']} x {device['kind']} ({device['platform']})",
        "Versions": ", ".join(versions),
        "Solver": f"{solver}, {sampling['steps']} steps",
        "Guidance": _guidance(sampling),
        "Execution of quantized layers": sampling["execution"] or "the best for the device",
        "Seeds": ", ".join(dict.fromkeys(str(sample["seed"]) for sample in sampling["samples"])),
        "Reference": metrics["reference"]["folder"],
        "Command": element("code", metrics["command"]),
    }
    pairs = [join(element("dt", name), element("dd", value)) for name, value in facts.items()]
    return _section("How it was made", element("dl", *pairs))


def _guidance(sampling: Mapping) -> str:
    scale, varies = f"scale {sampling['guidance_scale']:g}", sampling["dynamic_guidance"]
    kind = f" that varies by {varies}" if varies else ""
    if (first := sampling.get("first_frame_guidance")) is not None:
        kind = f" in the last frame, {first:g} in the first"
    return f"{scale}{kind}, in {sampling['guided_steps']} of {sampling['steps']} steps"


def _types(metrics: Mapping) -> str:
    return " and ".join(_bits(bits) for bits in metrics["reference"]["weight_bits"])


def _layer(row: Mapping) -> list[str]:
    shape, sqnr = " x ".join(map(str, row["shape"])), row["sqnr_db"]
    bits = (_bits(row["weight_bits"]), _bits(row["activation_bits"]))
    ratio = "" if sqnr is None else f"{sqnr:.1f}"
    return [row["path"], row["role"], shape, *bits, f"{row['bytes']:,}", ratio, row["reason"]]


def _section(title: str, *children: object) -> Markup:
    return element("section", element("h2", title), *children)


def _interval(entry: Mapping, digits: int = 3) -> Markup:
    """`0.912 [0.89, 0.93]` with `digits` significant digits in the brackets and one more before them."""
    bounds = f"[{entry['low']:.{digits}g}, {entry['high']:.{digits}g}]"
    return join(f"{entry['mean']:.{digits + 1}g} ", element("span", bounds, class_="interval"))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _bits(bits: int | None) -> str:
    if bits is None:
        return ""
    return f"float {bits}" if bits >= 16 else str(bits)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
