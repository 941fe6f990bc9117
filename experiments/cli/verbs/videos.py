"""Verbs that run the sampler, sample and evaluate, and encode-prompts before them."""

from typing import Any

from experiments.cli import values
from experiments.cli.arguments import EncodePrompts, Evaluate, Sample
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
        recipe=arguments.recipe,
        dtype=arguments.dtype,
        mesh=values.mesh(arguments.mesh),
        batch=arguments.batch,
        progress=progress,
    )
    encoder = report["text_encoder"]
    recipe = "" if encoder["recipe"] is None else f", {encoder['recipe']}"
    made = f"{report['file']}: {report['texts']} texts of {report['tokens']} tokens, {report['dim']} features each"
    return Outcome(report, [made, *_cut(report), f"{encoder['class']}{recipe}: {size(encoder['weight_bytes'])}"])


def _cut(report: dict[str, Any]) -> list[str]:
    """A line for every prompt that was too long."""
    return [f"{count} tokens were cut off the end of {text!r}" for text, count in report.get("cut", {}).items()]


def sample(arguments: Sample, progress: Progress | None) -> Outcome:
    """Sample videos from a folder and write them with a JSON file beside."""
    from experiments.sampling import sample_folder

    report = sample_folder(
        arguments.dir,
        arguments.output,
        **{name: getattr(arguments, name) for name in values.SETTINGS},
        prompts=values.prompts(arguments.prompt, arguments.prompts),
        seeds=values.seeds(arguments.seeds),
        context_file=arguments.context,
        denoiser=arguments.denoiser,
        fps=arguments.fps,
        scale=arguments.scale,
        dtype=arguments.dtype,
        execution=arguments.execution,
        mesh=values.mesh(arguments.mesh),
        batch=arguments.batch,
        step_loop=arguments.step_loop,
        one_batch=arguments.one_batch,
        float_attention=(arguments.float_attention_first, arguments.float_attention_last),
        progress=progress,
    )
    frames, height, width = report["latents"][:3]
    lines = [*map(str, report["files"]), *_cut(report)]
    lines.append(
        f"latents of {frames} x {height} x {width}, {report['solver']}, guidance {number(report['guidance_scale'])}"
    )
    lines.append(
        f"{report['steps']} steps, {number(report['seconds_per_step'])} s a step, "
        f"compiled in {number(report['compile_seconds'])} s on {report['device']}"
    )
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
