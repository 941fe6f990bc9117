"""The training step, on one device or a mesh: many steps in one call, or one on a given batch."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments.training.objective import Corrupted
from experiments.training.precision import computing_in
from experiments.training.settings import Settings, micro_batches
from experiments.training.student import Student
from qvdjax.errors import UserError
from qvdjax.parallel import abstract, shardings

State = dict[str, Any]
"""params and average (nnx.State of Param; the average is {} where none is kept), optimizer (optax state), step,
total and skipped (int32 (); skipped: steps in a row that were left out because they were not finite)."""

Metrics = dict[str, jax.Array]
"""loss and gradient_norm (before clipping), float32 (): means over the steps of a call that were finite. left_out:
how many were not, int32 ()."""

Draw = Callable[[int, jax.Array, int], dict[str, jax.Array]]
"""draw(seed, step, size) -> the batch of a step, {latents, context}; works inside jit."""


class Trainer:
    """A model's structure with its settings; holds no arrays that training changes.

    `finished(state)` is the model as it is stored.

    Args:
        model: What is trained: its `student.trained` move, everything else stays. It may be abstract, to compile only.
        settings: See `Settings`.
        teacher: Frozen, or None.
        student: What a recipe makes of the model while it is trained; the model itself by default.
        draw: The data of `advance`, drawn inside the step; not needed where batches are given.
        mesh: Where parameters, moments and batches are spread, as `qvdjax.parallel.RULES` say; None for one
            device. The teacher must be placed there by who loads it.
    """

    def __init__(
        self, model: nnx.Module, settings: Settings, *, teacher: nnx.Module | None = None,
        student: Student = Student(), draw: Draw | None = None,
        mesh: Mesh | None = None,
    ):  # fmt: skip
        described = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))
        prepared = jax.eval_shape(student.prepare, model) if described else student.prepare(model)
        self.graph, self.initial, self.rest = nnx.split(prepared, student.trained, ...)
        self.settings, self.teacher, self.student, self.draw, self.mesh = settings, teacher, student, draw, mesh
        placed = None if mesh is None else (shardings(jax.eval_shape(self._first, self.initial, 0), mesh), None)
        self.run = jax.jit(self._run, donate_argnums=0, out_shardings=placed)
        self.run_on = jax.jit(self.step_on, donate_argnums=0, out_shardings=placed)
        self.watch = jax.jit(student.watched)

    def start(self, total: int) -> State:
        """The state before the first of `total` steps."""
        described = jax.eval_shape(self._first, self.initial, total)
        placed = None if self.mesh is None else shardings(described, self.mesh)
        # As one program, so that all arrays are tied to a device or none is, as behind a step: otherwise the second
        # call would be another program for the compiler where the weights were read from a folder.
        first = jax.jit(self._first, out_shardings=placed)(self.initial, total)
        # The state is donated to each step, so nothing in it may be shared with the initial parameters.
        return jax.tree.map(jnp.copy, first)

    def forget_start(self) -> None:
        """Keep the shapes alone of the parameters training starts from: once there is a state, they cost a model.

        What `start` gave is not touched; it cannot be called again.
        """
        self.initial = jax.eval_shape(lambda initial: initial, self.initial)

    def described(self, total: int) -> State:
        """`start(total)` as ShapeDtypeStructs, on the mesh where there is one."""
        state = jax.eval_shape(self._first, self.initial, total)
        return state if self.mesh is None else abstract(state, self.mesh)

    def _first(self, initial: nnx.State, total: int) -> State:
        average = {} if self.settings.average is None else initial
        optimizer = self.settings.transformation.init(initial)
        numbers = {"step": jnp.int32(0), "total": jnp.int32(total), "skipped": jnp.int32(0)}
        return {"params": initial, "average": average, "optimizer": optimizer, **numbers}

    def model(self, state: State, *, averaged: bool = True) -> nnx.Module:
        """The model with the averaged weights where they are kept, or the last ones."""
        averaged = averaged and self.settings.average is not None
        return nnx.merge(self.graph, state["average" if averaged else "params"], self.rest)

    def finished(self, state: State) -> nnx.Module:
        """The model as it is stored: without what only training has."""
        return self.student.finish(self.model(state))

    def advance(self, state: State, steps: int) -> tuple[State, Metrics]:
        """`steps` steps on data drawn by rule. The given state is used up."""
        with self._scope():
            return self.run(state, jnp.int32(steps), self.rest, self.teacher)

    def advance_on(self, state: State, data: dict[str, jax.Array]) -> tuple[State, Metrics]:
        """One step on a given batch {latents, context}, see `Objective.corrupt`. The given state is used up."""
        with self._scope():
            return self.run_on(state, data, self.rest, self.teacher)

    def watched(self, state: State) -> dict[str, float]:
        """What the student says of its parameters, see `Student.watched`; waits for the device."""
        with self._scope():
            found = self.watch(state["params"], state["step"])
        return {name: float(value) for name, value in found.items()}

    def check(self, state: State) -> None:
        """Stop a training that no longer learns.

        Raises:
            UserError: The last steps, more than `Settings.tolerated`, were all left out.
        """
        skipped, step = int(state["skipped"]), int(state["step"])
        if skipped > self.settings.tolerated:
            raise UserError(
                f"at step {step} the loss or its gradient has not been finite for {skipped} steps",
                remedy="lower the learning rate, give more steps of warm-up, or look for odd values in the data",
            )

    def _scope(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _run(self, state: State, steps: jax.Array, rest, teacher) -> tuple[State, Metrics]:
        # The bound is data, so runs of every length are the same compiled loop and continue bit for bit.
        def body(_, carry):
            state, total = carry
            data = self.draw(self.settings.seed, state["step"], self.settings.batch)
            state, metrics = self.step_on(state, data, rest, teacher)
            counted = {name: jnp.where(metrics["left_out"], 0, metrics[name]) for name in ("loss", "gradient_norm")}
            return state, jax.tree.map(jnp.add, total, {**counted, "left_out": metrics["left_out"]})

        zero = {"loss": jnp.float32(0), "gradient_norm": jnp.float32(0), "left_out": jnp.int32(0)}
        state, total = jax.lax.fori_loop(0, steps, body, (state, zero))
        count = steps - total["left_out"]  # 0 / 0 is nan: no step was finite
        return state, {
            **{name: total[name] / count for name in ("loss", "gradient_norm")},
            "left_out": total["left_out"],
        }

    def step_on(self, state: State, data: dict[str, jax.Array], rest, teacher) -> tuple[State, Metrics]:
        """One step as a pure function, what `advance_on` compiles.

        A step whose loss or gradient is not finite leaves everything but the counters as it was.
        """
        settings, step = self.settings, state["step"]
        begun = self.student.begin_step(state["params"], state["optimizer"], state["average"], step)
        state = {**state, **dict(zip(("params", "optimizer", "average"), begun, strict=True))}
        corrupted = settings.corrupted(data, step)
        loss, gradients = self._gradients(state["params"], corrupted, step, rest, teacher)
        norm = optax.tree.norm(gradients)
        updates, optimizer = settings.transformation.update(gradients, state["optimizer"], state["params"])
        params = self._moved(state["params"], updates, settings.rate(step, state["total"]))
        moved = {"params": params, "average": {}, "optimizer": optimizer}
        if settings.average is not None:
            decay = settings.average_decay(step)
            moved["average"] = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state["average"], params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = {name: state[name] for name in moved}
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
        skipped = jnp.where(finite, 0, state["skipped"] + 1)
        state = {**moved, "step": step + 1, "total": state["total"], "skipped": skipped}
        return state, {"loss": loss, "gradient_norm": norm, "left_out": 1 - finite.astype(jnp.int32)}

    def _moved(self, params: nnx.State, updates: nnx.State, rate: jax.Array) -> nnx.State:
        """Parameters after a step: each kind of Variable at its own rate."""

        def move(variable: nnx.Variable, update: nnx.Variable) -> nnx.Variable:
            own = rate * self.settings.group_rate(type(variable))
            return variable.replace(variable.get_value() - own * update.get_value())

        return jax.tree.map(move, params, updates, is_leaf=lambda node: isinstance(node, nnx.Variable))

    def _gradients(
        self, params: nnx.State, corrupted: Corrupted, step: jax.Array, rest, teacher
    ) -> tuple[jax.Array, nnx.State]:
        """Mean loss and its gradient, micro-batch after micro-batch."""
        settings = self.settings

        def loss_of(params, corrupted):
            student = computing_in(self.student.at(nnx.merge(self.graph, params, rest), step), settings.dtype)
            velocity = functools.partial(student, remat=True) if settings.remat else student
            return settings.objective.loss(velocity, corrupted, teacher)

        gradient = jax.value_and_grad(loss_of)
        if settings.accumulate == 1:
            return gradient(params, corrupted)
        parts = micro_batches(corrupted, settings.accumulate)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda value: value / settings.accumulate, total)
