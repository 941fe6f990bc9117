"""Verbs that run the sampler, sample and evaluate, and encode-prompts before them."""

from typing import Any

from experiments.cli import values
from experiments.cli.arguments import Compare, EncodePrompts, EncodeVideos, Evaluate, Sample, Score, VBench
from experiments.cli.outcome import Outcome, Table, number, size
from experiments.cli.terminal import Progress

THRESHOLDS = (
    "max_teacher_forced_error", "max_trajectory_error", "min_psnr", "min_ssim", "min_oracle",
    "max_bytes_ratio",
)  # fmt: skip
MEASURES = ("teacher_forced_error", "trajectory_error", "psnr", "ssim")


def encode_prompts(arguments: EncodePrompts, progress: Progress | None) -> Outcome:
    """Encode prompts with a pipeline's text encoder into a file of text embeddings."""
    from experiments.encoding import encode_prompts

    report = encode_prompts(
        arguments.dir,
        arguments.out,
        values.prompts(arguments.prompt, arguments.prompts),
        negative_prompt=arguments.negative_prompt,
        image=arguments.image,
        video=values.video(arguments.video),
        fps=arguments.fps,
        motion_bucket=arguments.motion_bucket,
        noise_augmentation=arguments.noise_augmentation,
        recipe=arguments.recipe,
        dtype=arguments.dtype,
        mesh=values.mesh(arguments.mesh),
        batch=arguments.batch,
        progress=progress,
    )
    encoder = report["text_encoder"]
    if encoder is None:
        made = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in report["image"].items())
        return Outcome(report, [f"{report['file']}: {made}"])
    recipe = "" if encoder["recipe"] is None else f", {encoder['recipe']}"
    made = f"{report['file']}: {report['texts']} texts of {report['tokens']} tokens, {report['dim']} features each"
    return Outcome(report, [made, *_cut(report), f"{encoder['class']}{recipe}: {size(encoder['weight_bytes'])}"])


def encode_videos(arguments: EncodeVideos, progress: Progress | None) -> Outcome:
    """Encode clips and captions into a training folder."""
    from experiments.video_encoding import encode_videos

    report = encode_videos(
        arguments.clips,
        arguments.pipeline,
        arguments.out,
        video=values.video(arguments.video),
        fps=arguments.fps,
        draw=arguments.draw,
        dtype=arguments.dtype,
        batch=arguments.batch,
        progress=progress,
    )
    frames, height, width = report["video"]
    of = f"{frames} frames of {height} x {width}, latents of {' x '.join(map(str, report['latents']))}"
    lines = [f"{report['encoded']} of {report['clips']} clips, {of}", *_cut(report)]
    lines.append(
        f"-> {report['output']}" if report["written"]
        else f"{report['left']} clips are being encoded by other processes, the last of which writes {report['output']}"
    )  # fmt: skip
    return Outcome(report, lines, missed=[entry["error"] for entry in report["failed"]])


def _cut(report: dict[str, Any]) -> list[str]:
    """A line for every prompt that was too long."""
    cut = report.get("cut", {})
    return [f"{count} tokens were cut off the end of {_beginning(text)!r}" for text, count in cut.items()]


def _beginning(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def sample(arguments: Sample, progress: Progress | None) -> Outcome:
    """Sample videos from a folder and write them with a JSON file beside."""
    from experiments.sampling import sample_folder
    from experiments.sampling.memory_plan import parse_limit

    report = sample_folder(
        arguments.dir,
        arguments.output,
        **{name: getattr(arguments, name) for name in values.SETTINGS},
        prompts=values.prompts(arguments.prompt, arguments.prompts),
        seeds=values.seeds(arguments.seeds),
        context_file=arguments.context,
        denoiser=arguments.denoiser,
        image=arguments.image,
        names=arguments.names,
        video=values.video(arguments.video),
        fps=arguments.fps,
        motion_bucket=arguments.motion_bucket,
        noise_augmentation=arguments.noise_augmentation,
        scale=arguments.scale,
        dtype=arguments.dtype,
        execution=arguments.execution,
        mesh=values.mesh(arguments.mesh),
        batch=arguments.batch,
        step_loop=arguments.step_loop,
        previews=arguments.previews,
        memory_limit=None if arguments.memory_limit is None else parse_limit(arguments.memory_limit),
        one_batch=arguments.one_batch,
        float_attention=(arguments.float_attention_first, arguments.float_attention_last),
        progress=progress,
    )
    lines = [*map(str, report["files"]), *_cut(report), *_settings(report)]
    lines.append(
        f"{report['steps']} steps, {number(report['seconds_per_step'])} s a step, "
        f"compiled in {number(report['compile_seconds'])} s on {report['device']}"
    )
    return Outcome(report, [*lines, *_plan(report["memory_plan"]), _memory(report["memory"])])


def _settings(report: dict[str, Any]) -> list[str]:
    """What was sampled with, most of which the folder or the family chose."""
    latents = f"latents of {' x '.join(map(str, report['latents'][:3]))}"
    video = report["videos"][0] if report["videos"] else {}
    if "fps" in video:  # what is kept as latents has no frames a second
        pixels = f"{video['frames']} frames of {video['height']} x {video['width']}"
        latents = f"{pixels}, {number(video['fps'])} a second, from {latents}"
    shift = report.get("shift")  # which not every solver has
    solver = report["solver"] + ("" if shift is None else f" with shift {number(shift)}")
    lines = [latents, f"{solver}, guidance {number(report['guidance_scale'])}"]
    return [*lines, f"guided away from {report['negative_prompt']!r}"] if report["negative_prompt"] else lines


def _plan(plan: dict[str, Any] | None) -> list[str]:
    """What was chosen for a limit of memory."""
    if plan is None:
        return []
    tiling, texts = plan["tiling"], plan["texts"]
    chosen = ["one video at once" if plan["batch"] == 1 else f"{plan['batch']} videos at once"]
    chosen += [] if texts is None else [f"texts encoded on the {texts}"]
    chosen += [] if tiling is None else [f"the VAE in tiles of {' x '.join(map(str, tiling['tile']))} latents"]
    return [f"below {size(plan['limit_bytes'])}: {', '.join(chosen)}"]


def _memory(components: dict[str, dict[str, Any]]) -> Table:
    """What each component holds and needs; one runs after the other."""
    rows = [
        (name, size(held["weight_bytes"]), "-" if held["peak_bytes"] is None else size(held["peak_bytes"]))
        for name, held in components.items()
    ]
    return Table(("memory", "weights", "peak on a device"), rows, right=frozenset({"weights", "peak on a device"}))


def compare(arguments: Compare, progress: Progress | None) -> Outcome:
    """Put videos side by side."""
    from experiments.side_by_side import compare_videos

    report = compare_videos(
        arguments.videos, arguments.output, labels=arguments.label, columns=arguments.columns, fps=arguments.fps
    )
    frames, height, width = (report[name] for name in ("frames", "height", "width"))
    return Outcome(report, [f"{report['file']}: {frames} frames of {height} x {width}, {', '.join(report['labels'])}"])


def score(arguments: Score, progress: Progress | None) -> Outcome:
    """Score videos by metrics whose weights are named."""
    from experiments.sampling.output import write_json
    from experiments.video_metrics import score_videos

    report = score_videos(
        arguments.videos,
        reference=arguments.reference,
        clip=arguments.clip,
        lpips=arguments.lpips,
        i3d=arguments.i3d,
        progress=progress,
    )
    if arguments.output is not None:
        write_json(arguments.output, report)
    rows = [
        (name, number(found), "", "") if name == "fvd"
        else (name, *(number(found[key]) for key in ("mean", "low", "high")))
        for name, found in report["scores"].items()
    ]  # fmt: skip
    lines: list[str | Table] = [Table(("score", "mean", "low", "high"), rows, right=frozenset({"mean", "low", "high"}))]
    lines += report["notes"]
    lines += [f"{name}: not computed; it needs {need}" for name, need in report["missing"].items()]
    return Outcome(report, lines)


def vbench(arguments: VBench, progress: Progress | None) -> Outcome:
    """Normalise and weigh VBench's scores."""
    from experiments.vbench import score_results

    report = score_results(arguments.results)
    rows = [
        (name, number(report["raw"][name]), number(score), number(report["videos"][name]))
        for name, score in report["normalised"].items()
    ]
    rows += [(name, "", number(report[name]), "") for name in ("quality", "semantic", "total")]
    columns = ("VBench", "raw", "normalised", "videos")
    lines: list[str | Table] = [Table(columns, rows, right=frozenset(columns[1:]))]
    if missing := report["missing"]:
        every = len(missing) + len(report["raw"])
        lines.append(f"no total: {len(missing)} of {every} dimensions are missing: {', '.join(missing)}")
    return Outcome(report, lines)


def evaluate(arguments: Evaluate, progress: Progress | None) -> Outcome:
    """Compare two folders at the same seeds."""
    from experiments.evaluation import evaluate

    report = evaluate(
        arguments.reference,
        arguments.candidate,
        arguments.output,
        prompts=values.prompts(arguments.prompt, arguments.prompts),
        count=arguments.count,
        seeds=values.seeds(arguments.seeds),
        **{name: getattr(arguments, name) for name in values.SETTINGS},
        context_file=arguments.context,
        batch=arguments.batch,
        thresholds={name: getattr(arguments, name) for name in THRESHOLDS},
        execution=arguments.execution,
        mesh=values.mesh(arguments.mesh),
        progress=progress,
    )
    lines: list[str | Table] = [_fidelity(report)]
    if report["oracle"] is not None:
        lines += ["", _oracle(report["oracle"])]
    held = report["weight_bytes"]
    lines += [
        "",
        f"weights: {size(held['reference'])} -> {size(held['candidate'])} ({held['ratio']:.3f})",
        f"report: {arguments.output / 'report.html'}",
    ]
    return Outcome(report, lines, missed=report["failures"])


def _fidelity(report: dict[str, Any]) -> Table:
    """Distance of candidate from reference: mean over prompts, 95 % bootstrap interval."""
    measured = [(name, report[name]) for name in MEASURES if report[name] is not None]
    rows = [(name, *(number(entry[key]) for key in ("mean", "low", "high"))) for name, entry in measured]
    return Table(("candidate against reference", "mean", "low", "high"), rows, right=frozenset({"mean", "low", "high"}))


def _oracle(oracle: dict[str, Any]) -> Table:
    rows = [
        (score, number(oracle["reference"][score]["mean"]), number(oracle["candidate"][score]["mean"]))
        for score in oracle["reference"]
    ]
    return Table(("oracle", "reference", "candidate"), rows, right=frozenset({"reference", "candidate"}))
