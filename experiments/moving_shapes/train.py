"""Train the small models of the bench: a Wan, a CogVideoX and AnimateDiff's UNet.

    python -m experiments.moving_shapes.train OUT --steps 30000              # minutes on a GPU
    python -m experiments.moving_shapes.train OUT --minutes 6                # as many steps as fit
    python -m experiments.moving_shapes.train OUT --data FOLDER --steps 300  # precomputed latents, by grain
    python -m experiments.moving_shapes.train OUT --teacher FOLDER --recipe rtn-w4a4 --steps 300

The last starts from the teacher's weights, rounds weights and activations as the recipe says (gradients pass
straight through), follows the teacher's velocity, and writes the quantized model.

The clips are drawn on the device inside the training step, so the data is no bottleneck and depends on (seed,
step) alone. OUT becomes a diffusers folder with `pipeline.json` and `word_table.safetensors`, also when the
time runs out. Progress goes to stdout, one JSON object a line.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

import models
from experiments.moving_shapes.captions import TOKENS, WORDS
from experiments.moving_shapes.clips import FACTOR, FRAMES, POOL, SIZE
from experiments.moving_shapes.data import batch
from experiments.moving_shapes.words import WIDTH, embeddings
from experiments.training.log import Log
from experiments.training.objective import Objective
from experiments.training.plans import averaged, following, group_rates
from experiments.training.settings import Settings
from experiments.training.states import last_state, save_state
from experiments.training.student import student_of
from experiments.training.trainer import State, Trainer
from models.pipeline import Pipeline
from models.unet_motion import UNetMotionModel
from models.unet_transformers import TemporalTransformer
from qvdjax import recipes
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.nn.variables import iterate

SIDE: Final = SIZE // (POOL * FACTOR)  # of latents
CHANNELS: Final = FACTOR * FACTOR * 3
_COMMON = {
    "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6, "in_channels": CHANNELS,
    "out_channels": CHANNELS,
}  # fmt: skip
# A token is one latent position over three frames: what moves is seen within it (README.md has the comparison).
CONFIGS: Final = {
    "wan": {
        "_class_name": "WanTransformer3DModel", **_COMMON, "patch_size": [3, 1, 1], "text_dim": WIDTH, "freq_dim": 64,
        "ffn_dim": 512, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        "rope_max_seq_len": 64,
    },
    # Of version 1.5, which has patches over time.
    "cogvideox": {
        "_class_name": "CogVideoXTransformer3DModel", **_COMMON, "patch_size_t": 3, "patch_size": 1,
        "text_embed_dim": WIDTH, "time_embed_dim": 64, "max_text_seq_length": TOKENS, "sample_frames": FRAMES,
        "sample_height": SIDE, "sample_width": SIDE, "temporal_compression_ratio": 1,
        "use_rotary_positional_embeddings": True,
    },
    # Two levels of resolution, as v1 without a motion module in the middle. A UNet knows no patches, so the three
    # frames are one frame of latents, as a VAE that compresses time makes them.
    "animatediff": {
        "_class_name": "UNetMotionModel", "in_channels": 3 * CHANNELS, "out_channels": 3 * CHANNELS,
        "sample_size": SIDE, "block_out_channels": [64, 56],
        "down_block_types": ["CrossAttnDownBlockMotion", "DownBlockMotion"],
        "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion"], "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": WIDTH, "num_attention_heads": 1, "motion_num_attention_heads": 1,
        "motion_max_seq_length": 16, "use_motion_mid_block": False,
    },
}  # fmt: skip
# Name, shift, and what is not the default of the solver, which has the noise levels of published models.
_SOLVERS = {
    "wan": ("unipc", 3.0, {}),
    # That of version 1.5 and of the 5B; the 2B shifts to more noise, where no shape can be told from another.
    "cogvideox": ("ddim", None, {"snr_shift_scale": 1.0}),
    # AnimateDiff's betas, but nothing of the clip left at the last: otherwise backgrounds follow the noise. The clip is
    # predicted, because what is predicted has to pass through few features (README.md).
    "animatediff": ("ddim", None, {
        "beta_schedule": "linear", "snr_shift_scale": 1.0, "prediction_type": "sample",
    }),
}  # fmt: skip


# What an error of the data weighs. Without it a UNet's frames stay alike (README.md).
_WEIGHTS = {"animatediff": {"motion": 10.0, "most": 5.0}}
# Where 3 is not the best of those measured (README.md).
_GUIDANCE = {"cogvideox": 5.0}
_FRAME_FACTOR = {"animatediff": 3}


def pipeline(family: str = "wan") -> Pipeline:
    """How a bench model of a family is sampled."""
    solver, shift, options = _SOLVERS[family]
    frame_factor = _FRAME_FACTOR.get(family, 1)
    return Pipeline(
        words=WORDS, embeddings=embeddings(), tokens=TOKENS, frames=FRAMES // frame_factor, height=SIDE, width=SIDE,
        channels=CHANNELS * frame_factor, factor=FACTOR, enlarge=POOL, frame_factor=frame_factor, solver=solver,
        shift=shift, steps=20, guidance_scale=_GUIDANCE.get(family, 3.0), fps=8, solver_options=options,
    )  # fmt: skip


def initial_model(seed: int, config: dict[str, Any] = CONFIGS["wan"]) -> VideoModel:
    """A model as its authors initialise theirs: the last layer starts at zero; in a UNet each motion module's does."""
    model = jax.jit(functools.partial(models.build, config))(key=jax.random.key(seed))
    ends = [module.proj_out for _, module in iterate(model, TemporalTransformer)]
    ends.append(model.conv_out if isinstance(model, UNetMotionModel) else model.proj_out)
    for end in ends:
        end.weight[...] = jnp.zeros_like(end.weight[...])
    return model


def save_folder(model: VideoModel, path: Path) -> None:
    """Write a bench model: diffusers' files, `pipeline.json` and `word_table.safetensors`."""
    models.save(model, path)
    pipeline(models.family_of(model.config.to_dict()).name).save(path)


def steps_that_fit(seconds_a_step: float, minutes: float, elapsed: float) -> int:
    """How many more steps fit in `minutes`, `elapsed` seconds of them gone; a twentieth is for saving."""
    return max(1, int((minutes * 60 * 0.95 - elapsed) / seconds_a_step))


def train(trainer: Trainer, options: argparse.Namespace, log: Log) -> State:
    """Run the steps, in calls of `--chunk`, until the last or until the time is over."""
    state = trainer.start(options.steps or 2**30)
    if options.resume and options.checkpoints:
        state = last_state(options.checkpoints, state) or state
        log(event="start", step=int(state["step"]))
    batches = None
    if options.data:
        from experiments.training.latents import stream

        batches = stream(options.data, seed=options.seed, size=options.batch)
    saved = int(state["step"])
    speed: list[tuple[int, float]] = []  # (steps, seconds) of calls after the first, which compiles
    for call in itertools.count():
        step, total = int(state["step"]), int(state["total"])
        if step >= total or (options.minutes and log.seconds > options.minutes * 60 * 0.97):
            break
        began, chunk = log.seconds, min(options.chunk, total - step)
        if batches is None:
            state, metrics = trainer.advance(state, chunk)
        else:
            for number in range(step, step + chunk):
                state, metrics = trainer.advance_on(state, jax.tree.map(jnp.asarray, batches[number]))
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])  # waits for the device
        trainer.check(state)
        log(event="train", step=step + chunk, loss=round(loss, 5), gradient_norm=round(norm, 5),
            rate=float(trainer.settings.rate(state["step"], state["total"])))  # fmt: skip
        if call:
            speed.append((chunk, log.seconds - began))
        if not options.steps and len(speed) == 3 and total == 2**30:
            done, spent = (sum(column) for column in zip(*speed))
            fit = int(state["step"]) + steps_that_fit(spent / done, options.minutes, log.seconds)
            state["total"] += fit - total  # a new array would lie elsewhere, and be another program to compile
            log(event="plan", total=fit, milliseconds_a_step=round(1000 * spent / done, 2))
        if options.checkpoints and int(state["step"]) - saved >= options.save_every:
            save_state(options.checkpoints, state)
            saved = int(state["step"])
    if options.checkpoints and int(state["step"]) > saved:
        save_state(options.checkpoints, state)
    return state


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.moving_shapes.train", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    defaults = Settings()
    add = parser.add_argument
    add("out", type=Path, help="new model folder")
    add("--family", choices=list(CONFIGS), default="wan", help="architecture, where neither --start nor --teacher says")
    add("--steps", type=int, default=0, help="training steps; 0: as many as fit in --minutes")
    add("--minutes", type=float, default=0, help="stop and save after this time; 0: no limit")
    add("--batch", type=int, default=defaults.batch, help="clips in a step")
    add("--seed", type=int, default=defaults.seed, help="of the initial weights, the clips and the noise")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="peak")
    add("--optimizer", choices=["adamw", "muon"], default=defaults.optimizer, help="muon: for the blocks' matrices")
    add("--warm-up", type=int, default=defaults.warm_up, help="steps of linear warm-up")
    add("--frames", type=int, help="train on the first so many frames of each clip only, which is cheaper")
    add("--start", type=Path, help="begin with the weights of this model folder")
    add("--average", type=float, default=defaults.average, help="decay a step of the averaged weights")
    add("--chunk", type=int, default=200, help="steps in one call, and between two lines of the log")
    add("--data", type=Path, help="folder of precomputed latents instead of clips drawn by rule")
    add("--teacher", type=Path, help="model folder whose velocity is followed")
    add("--recipe", help="train the teacher's weights under this recipe's rounding, and quantize them by it")
    add("--data-weight", type=float, default=0.0, help="with a teacher: weight of the data's own velocity")
    add("--log", type=Path, help="also write the log here, one JSON object a line")
    add("--checkpoints", type=Path, help="folder for training states (Orbax)")
    add("--save-every", type=int, default=5000, help="steps between two training states")
    add("--resume", action="store_true", help="continue from the newest state in --checkpoints")
    add(
        "--evaluate",
        type=int,
        default=0,
        metavar="CLIPS",
        help="afterwards sample so many clips and score them",
    )
    options = parser.parse_args(argv)
    if not options.steps and not options.minutes:
        parser.error("give --steps or --minutes")
    if options.resume and not options.checkpoints:
        parser.error("--resume needs --checkpoints")
    if options.recipe and not options.steps:
        parser.error("--recipe needs --steps, which its phases divide")
    if options.recipe and not options.teacher:
        parser.error("--recipe needs --teacher, whose weights it starts from")
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new folder")
    return options


def main(argv: list[str] | None = None) -> None:
    """Train, save, and say how well it went."""
    options = arguments(argv)
    log = Log(options.log, echo=True)
    teacher = models.load(options.teacher) if options.teacher else None
    recipe = recipes.get(options.recipe) if options.recipe else None
    plan = None if recipe is None else recipe.training
    start = options.start or (options.teacher if options.recipe else None)
    model = models.load(start) if start else initial_model(options.seed, CONFIGS[options.family])
    family = models.family_of(model.config.to_dict()).name
    own = pipeline(family)
    objective = Objective() if teacher is None else following(plan, options.data_weight)
    weights = _WEIGHTS.get(family, {}) if teacher is None else {}
    objective = dataclasses.replace(
        objective, solver=own.make_solver(), frame_factor=own.frame_factor, **weights,
    )  # fmt: skip
    settings = Settings(
        seed=options.seed, batch=options.batch, learning_rate=options.learning_rate, warm_up=options.warm_up,
        average=averaged(plan, options.average),
        optimizer=options.optimizer, frames=options.frames, objective=objective,
        group_rates=group_rates(plan),
    )  # fmt: skip
    student = student_of(model, recipe, options.steps)
    draw = functools.partial(batch, frame_factor=own.frame_factor)
    trainer = Trainer(model, settings, teacher=teacher, student=student, draw=draw)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trainer.initial))
    log(event="model", parameters=parameters, device=jax.devices()[0].device_kind, jax=jax.__version__)
    state = train(trainer, options, log)
    save_folder(trainer.finished(state), options.out)
    log(event="saved", folder=str(options.out), step=int(state["step"]))
    if options.evaluate:
        from experiments.moving_shapes.full_precision import evaluate_full_precision

        log(event="scores", **evaluate_full_precision(options.out, clips=options.evaluate))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"train: {error}", file=sys.stderr)
        sys.exit(2)
