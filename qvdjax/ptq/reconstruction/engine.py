"""Block after block: what the full-precision block gives, what is trained towards it, what is kept."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme, Linear, VideoModel
from qvdjax.nn.variables import dotted, iterate
from qvdjax.parallel import to_host
from qvdjax.ptq.reconstruction.adaptive_rounding import hardened
from qvdjax.ptq.reconstruction.examples import (
    Examples,
    Inputs,
    embedded,
    in_chunks,
    kept,
    on_device,
    outputs,
    targets,
    without_blocks,
)
from qvdjax.ptq.reconstruction.finished import BlockReport, FinishedBlocks
from qvdjax.ptq.reconstruction.learned_transform import Learned
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.reconstructed_linear import ReconstructedLinear
from qvdjax.ptq.reconstruction.token_estimation import first_gains
from qvdjax.ptq.reconstruction.training import frame_statistics, has_gains, prepared, relative_error, start, train

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """What reconstruction found.

    Attributes:
        layers: By name in diffusers, what `qvdjax.ptq.layers.quantized_arrays` takes as `learned`.
        blocks: A report of each.
    """

    layers: dict[str, dict[str, Any]]
    blocks: tuple[BlockReport, ...]


def reconstruct(
    model: VideoModel, schemes: Mapping[str, LayerScheme], batches: Iterable[Inputs], plan: Reconstruction, *,
    fit=None, ranges: Mapping[str, tuple] | None = None, edges: Mapping[str, tuple] | None = None,
    finished: FinishedBlocks | None = None, progress: Progress | None = None,
) -> Reconstructed:  # fmt: skip
    """Train what a plan says of every block's layers, one block after the other.

    Nothing is known of the model but its protocol. Every block of a stack runs the same compiled functions.

    Args:
        model: A float model, on one device or on the mesh in scope (`jax.set_mesh`). Left as it is.
        schemes: One a layer and block, by name in diffusers.
        batches: Keyword arguments of the model's call: the examples.
        plan: How.
        fit, ranges, edges: As `qvdjax.ptq.apply_schemes` takes them.
        finished: Where finished blocks are kept, to go on after an interruption; None for nowhere.
        progress: Called with ("reconstructing", blocks done, blocks in all).

    Raises:
        UserError: See `in_chunks`; training that ends in values that are not finite.
    """
    outer = without_blocks(model)
    chunks = in_chunks(batches, plan.batch, outer, plan.memory)
    exact = kept([embedded(outer, chunk) for chunk in chunks])
    met = exact
    layers: dict[str, dict] = {}
    reports = []
    units = _blocks(model) if plan.scope == "block" else _all_blocks(model)
    count = sum(map(len, model.stacks)) if plan.scope == "block" else 1
    for number, (name, block, names) in enumerate(units):
        own = {path: schemes[full] for path, full in names.items()}
        found = ({path: (one or {}).get(full) for path, full in names.items()} for one in (ranges, edges))
        student = prepared(block, own, fit, *found, plan)
        known = None if finished is None else finished.get(name)
        results = [targets(block, outer, c, on_device(s), plan.token_weights) for c, s in zip(chunks, exact)]
        wanted, weights = kept([out for out, _ in results]), [w for _, w in results]
        if known is not None:
            learned, report = known
            nnx.update(student, _like(nnx.state(student, Learned), learned))
        else:
            student, report = _trained(student, outer, chunks, met, wanted, weights, plan, name)
            if finished is not None:
                finished.put(report, _flat(nnx.state(student, Learned)))
        student = hardened(student)
        reports.append(report)
        layers |= {names[path]: jax.tree.map(to_host, found) for path, found in _learned(student).items()}
        if plan.inputs == "propagated":
            met = kept([outputs(student, outer, c, on_device(s)) for c, s in zip(chunks, met)])
        else:
            met = wanted
        exact = wanted
        if progress:
            progress("reconstructing", number + 1, count)
    return Reconstructed(layers, tuple(reports))


def _trained(student, outer, chunks, met, wanted, weights, plan: Reconstruction, name: str):
    """A prepared block after training, and the report."""
    began = time.perf_counter()

    def chunk(i: int) -> Examples:
        return Examples(chunks[i], on_device(met[i]), on_device(wanted[i]), weights[i])

    def sums(block):
        """Squared error of the block as it would be deployed, and square of what it should change of the stream."""
        deployed = hardened(block)
        each = [relative_error(deployed, outer, chunk(i)) for i in range(len(chunks))]
        return tuple(sum(parts) for parts in zip(*each, strict=True))

    examples = sum(len(inputs["latents"]) for inputs in chunks)
    epochs = plan.epochs_of(examples)
    steps = epochs * examples
    # What a step does not read is the same in all plans, so that those that differ in it share their programs.
    rest = ("selection", "inputs", "memory", "batch", "epochs", "iterations")
    defaults = {field.name: field.default for field in dataclasses.fields(plan) if field.name in rest}
    plan = dataclasses.replace(plan, token_weights=None, **defaults)
    if plan.estimation is not None and plan.estimation.gains == "formula":
        _start_gains(student, outer, (chunk(i) for i in range(len(chunks))))
    state = start(student, plan=plan, steps=steps)
    nnx.update(student, state[0])
    error, square = sums(student)
    before = float(error / square)
    if jax.tree.leaves(state[0]):
        for _ in range(epochs):
            for i in range(len(chunks)):
                state = train(state, student, outer, chunk(i), square / examples, plan=plan, steps=steps)
        nnx.update(student, state[0])
        error, _ = sums(student)
    report = BlockReport(name, before, float(error / square), time.perf_counter() - began)
    if not report.after < float("inf"):  # nan too
        raise UserError(
            f"{name}: its training ended in values that are not finite",
            remedy="lower the rate, or check the calibration set",
        )
    return student, report


def _start_gains(student: nnx.Module, outer: VideoModel, chunks: Iterable[Examples]) -> None:
    """Put what gains start as by the paper's formula into a prepared block, in place."""
    total, count = None, 0
    for examples in chunks:
        found = frame_statistics(student, outer, examples)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += len(examples.stream)
    for path, layer in iterate(student, ReconstructedLinear):
        if has_gains(layer):
            means = {name: sums / count for name, sums in total[dotted(path)].items()}
            layer.estimator.gain[...] = first_gains(**means) - 1


@jax.jit
def _learned(block: nnx.Module) -> dict[str, dict]:
    """What was learned of each layer, by its path in the block."""
    return {dotted(path): layer.learned() for path, layer in iterate(block, ReconstructedLinear)}


def _blocks(model: VideoModel) -> Iterator[tuple[str, nnx.Module, dict[str, str]]]:
    """Name of every block, the block without a layer axis, and the full names of its linear layers by their paths.

    A block is a copy of its part of a stack, made when its turn comes.
    """
    for stack in model.stacks:
        paths = [path for path, _ in iterate(stack.block, Linear)]
        for i in range(len(stack)):
            yield stack.name(i), stack.layer(i), {dotted(path): stack.names(path)[i] for path in paths}


class AllBlocks(nnx.Module):
    """The blocks of a model as if they were one."""

    def __init__(self, blocks: list[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(self, stream, conditioning, *, remat: bool = False):
        """The first block's stream -> the last one's; `remat` recomputes each block in the backward pass."""

        def step(block, stream):
            return block(stream, conditioning)

        step = jax.checkpoint(step) if remat else step
        for block in self.blocks:
            stream = step(block, stream)
        return stream


def _all_blocks(model: VideoModel) -> Iterator[tuple[str, nnx.Module, dict[str, str]]]:
    """As `_blocks`, all of them as one."""
    found = list(_blocks(model))
    names = {f"blocks.{i}.{path}": full for i, (_, _, own) in enumerate(found) for path, full in own.items()}
    yield "model", AllBlocks([block for _, block, _ in found]), names


def _flat(state: nnx.State) -> dict[str, jax.Array]:
    """Arrays of a state by dotted paths."""
    return {dotted(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def _like(state: nnx.State, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """A state of the same Variables with these arrays."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, variable.replace(arrays[dotted(path)])) for path, variable in flat])
