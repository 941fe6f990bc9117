"""From noise to latents: the sampling loop, as one jitted scan or step by step."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.diffusion.guidance import DynamicGuidance, guidance_scales, guided, guided_steps
from qvdjax.diffusion.noise import check_seeds
from qvdjax.diffusion.schedule import Schedule
from qvdjax.diffusion.solvers import Solver
from qvdjax.errors import UserError
from qvdjax.nn import check_timesteps
from qvdjax.parallel import bytes_held

OnStep = Callable[[int, jax.Array, jax.Array], None]
"""Called after every step with the number of steps done (1, 2, ...), the latents they led to, and what the step's
prediction says the finished latents are."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleResult:
    """What sampling returns.

    Attributes:
        latents: The result, (batch, frames, height, width, channels), float32.
        trajectory: If asked for, the latents the model saw at every step,
            (steps, batch, frames, height, width, channels): `trajectory[0]` is the noise, and `latents` is
            what followed the last of them.
    """

    latents: jax.Array
    trajectory: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Precise:
    """The model of some steps, and which: a schedule of precision.

    Attributes:
        model: Of the same structure of inputs and outputs. Where it shares its arrays with the other one
            (`qvdjax.nn.with_float_attention`), it takes no memory.
        first, last: So many steps at the beginning, where the picture is decided, and at the end, where nothing after
            them mends an error.
    """

    model: Any
    first: int = 0
    last: int = 0

    def __post_init__(self):
        for name in ("first", "last"):
            if getattr(self, name) < 0:
                raise UserError(f"{getattr(self, name)} precise {name} steps", remedy="give 0 or more")

    def takes(self, step: int, steps: int) -> bool:
        """Whether this step, counted from 0, is one of them."""
        return step < self.first or step >= steps - self.last


def sample(
    model,
    context: jax.Array,
    negative_context: jax.Array | None = None,
    *,
    noise: jax.Array,
    solver: Solver,
    steps: int,
    guidance_scale: float = 1.0,
    dynamic_guidance: DynamicGuidance | None = None,
    guidance_until: float = 0.0,
    first_frame_guidance: float | None = None,
    seeds: Sequence[int] | None = None,
    trajectory: bool = False,
    on_step: OnStep | None = None,
    doubled_batch: bool = False,
    precise: Precise | None = None,
    **conditions,
) -> SampleResult:
    """Turn noise into latents.

    The whole run is one jitted `jax.lax.scan` over the steps. The model is an argument of that function, so
    two models of one structure (the same layers and shapes) share one compilation. Latents are float32
    throughout, whatever the model computes in.

    Args:
        model: A pytree that is called as `model(latents, timestep, context, **conditions) -> prediction`, with
            timestep (batch,) float as the solver says it, and predicts what the solver expects.
        context: Text embeddings, (batch, tokens, dim).
        negative_context: The same for what to avoid; needed unless `guidance_scale` is 1.
        noise: (batch, frames, height, width, channels), see `initial_noise`. Its sharding, and the model's,
            decide where the work is done.
        solver: See `get_solver`.
        steps: Number of steps; with guidance each costs two model evaluations.
        guidance_scale: 1 means no guidance.
        dynamic_guidance: Lets the scale vary over the steps, see `guidance_scales`; a scale of 1 stays none.
        guidance_until: Steps below this timestep (0..1000) are not guided, see `guided_steps`.
        first_frame_guidance: Lets the scale rise over the frames, from this to `guidance_scale`.
        seeds: One per video, those of `initial_noise`; needed by a solver that draws noise at its steps.
        trajectory: Also return the model's inputs.
        on_step: Given, the steps run one by one from Python, and this is called after each. The numbers are
            those of the scan up to rounding.
        doubled_batch: See `guided`.
        precise: Another model for the first and the last steps, such as the same with attention in full precision.
        conditions: Further arguments of the model, with a leading batch axis; those named `negative_<name>` stand in
            for `<name>` in the pass with the negative context, see `guided`.

    Returns:
        The latents and, if asked for, the trajectory. Raises `UserError` for a number of steps below 1, for
        guidance without a negative context, for seeds that are missing or unusable, for batches that differ, and for
        a model whose tables hold other timesteps than the solver's.
    """
    inputs = _inputs(noise, seeds, context, negative_context, guidance_scale, conditions)
    scales = Scales(guidance_scale, dynamic_guidance, guidance_until, first_frame_guidance)
    plan, parts = _plan(model, precise, solver, steps, scales, inputs[0].shape[1])
    run = Run(solver, doubled_batch=doubled_batch, trajectory=trajectory)
    both = (model, None if precise is None else precise.model)
    if on_step is None:
        return _scan(run, parts, both, plan, *inputs)
    return _loop(run, parts, both, plan, inputs, on_step)


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What compiling took.

    Attributes:
        seconds: For tracing and compiling.
        memory: The compiler's account of the program (`argument_size_in_bytes`, `temp_size_in_bytes`, ...),
            or None where the backend gives none.
        bytes_held: What it holds of one device, see `qvdjax.parallel.bytes_held`; of several programs the most.
    """

    seconds: float
    memory: Any
    bytes_held: int | None


def compile_sampler(
    model,
    context: jax.Array,
    negative_context: jax.Array | None = None,
    *,
    noise: jax.Array,
    solver: Solver,
    steps: int,
    guidance_scale: float = 1.0,
    dynamic_guidance: DynamicGuidance | None = None,
    guidance_until: float = 0.0,
    first_frame_guidance: float | None = None,
    seeds: Sequence[int] | None = None,
    trajectory: bool = False,
    step_loop: bool = False,
    doubled_batch: bool = False,
    precise: Precise | None = None,
    **conditions,
) -> Compilation:
    """Compile what `sample` runs with these arguments; it then starts at once. Raises as `sample` does.

    With `step_loop` it is a single step that is compiled: what `sample` runs when it is given an `on_step`.
    """
    inputs = _inputs(noise, seeds, context, negative_context, guidance_scale, conditions)
    scales = Scales(guidance_scale, dynamic_guidance, guidance_until, first_frame_guidance)
    plan, parts = _plan(model, precise, solver, steps, scales, inputs[0].shape[1])
    run = Run(solver, doubled_batch=doubled_batch, trajectory=trajectory)
    both = (model, None if precise is None else precise.model)
    start = time.perf_counter()
    if step_loop:
        noise, seeds, *rest = inputs
        first = _init(run, noise, seeds)
        # The steps that are run: of every kind once.
        kinds = {(part.is_guided, part.is_precise): part for part in parts}
        lowered = [
            _step.lower(run, part.is_guided, both[part.is_precise], plan.row(part.start), first, *rest)
            for part in kinds.values()
        ]
    else:
        lowered = [_scan.lower(run, parts, both, plan, *inputs)]
    # The program stays in jit's own cache. It is not called itself: on CPU, jax 0.10 refuses int4 arguments
    # there that jit accepts.
    compiled = [program.compile() for program in lowered]
    held = [bytes_held(program) for program in compiled]
    return Compilation(
        time.perf_counter() - start, compiled[0].memory_analysis(), None if None in held else max(held)
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """What each compiled step depends on beside shapes: a static argument of the jitted functions.

    The number of steps is not in it: a step that was compiled serves runs of any length.
    """

    solver: Solver
    doubled_batch: bool
    trajectory: bool

    def init(self, noise, seeds):
        """The solver's state before the first step."""
        return self.solver.init(noise, seeds)

    def step(self, is_guided: bool, model, plan, state, context, negative_context, conditions):
        """One step: ask the model where the latents go, and let the solver go there; the state after it, and what the
        prediction says the finished latents are."""
        predict = guided(model, plan.guidance_scales if is_guided else 1, doubled_batch=self.doubled_batch)
        batch = state.latents.shape[0]
        timestep = jnp.full((batch,), plan.schedule.timesteps, jnp.float32)  # (batch,)
        prediction = predict(state.latents, timestep, context, negative_context, **conditions)
        clean = self.solver.clean(plan.schedule, state.latents, prediction)
        return self.solver.step(plan.schedule, state, prediction), clean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What differs from step to step; all leaves have the leading axis `steps`.

    Attributes:
        schedule: The solver's.
        guidance_scales: float32 (steps,) or (steps, frames).
    """

    schedule: Schedule
    guidance_scales: np.ndarray

    def row(self, step: int | slice) -> "Plan":
        """One step of it, as `jax.lax.scan` hands it to `Run.step`, or a stretch of steps."""
        return jax.tree.map(lambda values: values[step], self)


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of steps of one kind: from `start` to before `stop`."""

    start: int
    stop: int
    is_guided: bool
    is_precise: bool = False


@dataclasses.dataclass(frozen=True)
class Scales:
    """What was asked for about guidance, see `sample`."""

    guidance_scale: float
    dynamic: DynamicGuidance | None
    until: float
    first_frame: float | None


def _plan(
    model, precise: Precise | None, solver: Solver, steps: int, asked: Scales, frames: int
) -> tuple[Plan, tuple[Part, ...]]:
    """All steps, and the stretches they fall into, those that are not empty; steps that the model cannot take raise."""
    schedule = solver.schedule(steps)
    for one in (model, None if precise is None else precise.model):
        if isinstance(one, nnx.Module):
            check_timesteps(one, schedule.timesteps)
    scales = guidance_scales(
        asked.guidance_scale, schedule.timesteps, asked.dynamic, first_frame=asked.first_frame, frames=frames
    )
    count = guided_steps(asked.guidance_scale, schedule.timesteps, asked.until)
    kinds = [(step < count, precise is not None and precise.takes(step, steps)) for step in range(steps)]
    ends = [step for step in range(1, steps) if kinds[step] != kinds[step - 1]]
    parts = (Part(start, stop, *kinds[start]) for start, stop in itertools.pairwise((0, *ends, steps)))
    return Plan(schedule, scales.astype(np.float32)), tuple(parts)


def _scan_steps(run: Run, parts: tuple[Part, ...], models: tuple, plan, noise, seeds, *inputs) -> SampleResult:
    def body(state, row, part):
        state_after, _ = run.step(part.is_guided, models[part.is_precise], row, state, *inputs)
        return state_after, state.latents if run.trajectory else None

    state, seen = run.init(noise, seeds), []
    for part in parts:
        rows = plan.row(slice(part.start, part.stop))
        state, inputs_seen = jax.lax.scan(functools.partial(body, part=part), state, rows)
        seen.append(inputs_seen)
    return SampleResult(state.latents, jnp.concatenate(seen) if run.trajectory else None)


_scan = jax.jit(_scan_steps, static_argnums=(0, 1))
_step = jax.jit(Run.step, static_argnums=(0, 1))
# Compiled too, so that keys made of the seeds lie on the devices of the noise.
_init = jax.jit(Run.init, static_argnums=0)


def _loop(run: Run, parts: tuple[Part, ...], models: tuple, plan: Plan, inputs: tuple, on_step: OnStep) -> SampleResult:
    noise, seeds, *rest = inputs
    state, seen = _init(run, noise, seeds), []
    for part in parts:
        for index in range(part.start, part.stop):
            if run.trajectory:
                seen.append(state.latents)
            state, clean = _step(run, part.is_guided, models[part.is_precise], plan.row(index), state, *rest)
            on_step(index + 1, state.latents, clean)
    return SampleResult(state.latents, jnp.stack(seen) if run.trajectory else None)


def _inputs(noise, seeds, context, negative_context, guidance_scale, conditions: dict) -> tuple:
    """The traced arguments of the jitted functions behind the plan, checked and in their dtypes."""
    noise = jnp.asarray(noise)
    noise = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    if guidance_scale == 1:
        negative_context = None  # not used, so not shipped to the devices either
    elif negative_context is None:
        raise UserError(
            f"guidance scale {guidance_scale} needs a negative context",
            remedy="pass one (zeros, or the encoding of a negative prompt), or a guidance scale of 1",
        )
    seeds = None if seeds is None else check_seeds(seeds)
    rows = {"seeds": seeds, "context": context, "negative_context": negative_context, **conditions}
    for name, array in rows.items():
        if array is not None and array.shape[0] != noise.shape[0]:
            raise UserError(
                f"{name} has shape {tuple(array.shape)} beside noise of shape {tuple(noise.shape)}",
                remedy=f"give it a leading axis of {noise.shape[0]}, one row a video",
            )
    return noise, seeds, context, negative_context, conditions
