"""Verbs that run the sampler: sample and evaluate."""

import dataclasses

from experiments.cli import values
from experiments.cli.arguments import Evaluate, Sample
from experiments.cli.outcome import Outcome, Table, number, size
from experiments.cli.terminal import Progress

THRESHOLDS = (
    "max_teacher_forced_error",
    "min_psnr",
    "min_ssim",
    "min_color",
    "min_shape",
    "min_direction",
)
SCORE_COLUMNS = ("", "mean", "low", "high")


def sample(arguments: Sample, progress: Progress | None) -> Outcome:
    """Sample videos from a folder and write them with a JSON file beside."""
    from experiments.sampling import sample_folder

    report = sample_folder(
        arguments.dir,
        arguments.output,
        prompts=values.prompts(arguments.prompt, arguments.prompts),
        seeds=values.seeds(arguments.seeds),
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        shift=arguments.shift,
        solver=arguments.solver,
        negative_prompt=arguments.negative_prompt,
        execution=arguments.execution,
        mesh=values.mesh(arguments.mesh),
        step_loop=arguments.step_loop,
        progress=progress,
    )
    lines = [str(path) for path in report["files"]]
    lines.append(
        f"{report['steps']} steps, {number(report['seconds_per_step'])} s a step, "
        f"compiled in {number(report['compile_seconds'])} s on {report['device']}"
    )
    return Outcome(report, lines)


def evaluate(arguments: Evaluate, progress: Progress | None) -> Outcome:
    """Compare two folders at the same seeds."""
    from experiments.evaluation import evaluate

    wanted = {name: getattr(arguments, name) for name in THRESHOLDS}
    report = evaluate(
        arguments.reference,
        arguments.candidate,
        arguments.output,
        prompts=values.prompts(arguments.prompt, arguments.prompts),
        count=arguments.count,
        seeds=values.seeds(arguments.seeds),
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        batch=arguments.batch,
        thresholds={name: bound for name, bound in wanted.items() if bound is not None},
        execution=arguments.execution,
        mesh=values.mesh(arguments.mesh),
        progress=progress,
    )
