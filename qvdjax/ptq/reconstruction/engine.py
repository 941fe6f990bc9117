"""Block after block: what the full-precision block gives, what is trained towards it, what is kept."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear, PartialBlock, VideoModel
from qvdjax.nn.partial_block import put, read
from qvdjax.nn.variables import dotted, iterate
from qvdjax.parallel import to_host
from qvdjax.ptq.feature_grids import temporal_features
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
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.learned_transform import Learned
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.programs import Programs
from qvdjax.ptq.reconstruction.reconstructed_layer import ReconstructedLayer
from qvdjax.ptq.reconstruction.reconstructed_linear import ReconstructedLinear
from qvdjax.ptq.reconstruction.temporal_layers import TEMPORAL, temporal_layers
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
    fitted: Mapping[str, Mapping] | None = None, levels: Mapping[str, tuple] | None = None,
    features: Mapping[str, np.ndarray] | None = None, finished: FinishedBlocks | None = None,
    progress: Progress | None = None,
) -> Reconstructed:  # fmt: skip
    """Train what a plan says of every block's layers, one block after the other.

    Nothing is known of the model but its protocol. Blocks of equal shape run the same compiled functions. Of a stream
    of several arrays (a UNet's skip connections) a block is given what it reads, and its loss is about what it makes;
    the rest waits where it is.

    Args:
        model: A float model, on one device or on the mesh in scope (`jax.set_mesh`). Left as it is.
        schemes: One a layer and block, by name in diffusers.
        batches: Keyword arguments of the model's call: the examples.
        plan: How.
        fit, ranges, edges, fitted: As `qvdjax.ptq.apply_schemes` takes them.
        levels: Levels and edges of the grids of temporal features, by name (`qvdjax.ptq.fit_feature_grids`).
        features: The inputs of layers of role "temporal_feature" at every timestep, by name, [timesteps, in] each
            (`qvdjax.ptq.feature_grids.temporal_features`), for a plan that trains them on the timestep alone; None for
            those of the examples.
        finished: Where finished blocks are kept, to go on after an interruption; None for nowhere.
        progress: Called with ("reconstructing", blocks done, blocks in all).

    Raises:
        UserError: See `in_chunks`; training that ends in values that are not finite.
    """
    outer = without_blocks(model)
    batches = list(batches) if iter(batches) is batches else batches
    chunks = in_chunks(batches, plan.batch, outer, plan.memory)
    known = _known(ranges=ranges, edges=edges, fitted=fitted, levels=levels)
    layers: dict[str, dict] = {}
    reports = []
    if plan.features == "timestep" and plan.rounding is not None:
        features = temporal_features(model, batches) if features is None else features
        unit = temporal_layers(model, schemes, features, fit, known, plan)
        if unit is not None:
            student, report = _finished(unit.student, unit.outer, [unit.examples], plan, TEMPORAL, finished)
            layers |= _host(unit.learned(student))
            reports.append(report)
            known |= unit.done(schemes, layers, levels)
    exact = kept([embedded(outer, chunk) for chunk in chunks])
    met = exact
    units = _blocks(model) if plan.scope == "block" else _all_blocks(model)
    count = sum(map(len, model.stacks)) if plan.scope == "block" else 1
    programs = Programs((start, train, relative_error, frame_statistics, targets, outputs, _learned))
    for number, (name, block, names) in enumerate(units):
        programs.enter(block)
        own = {path: schemes[full] for path, full in names.items()}
        student = prepared(block, own, fit, {path: known.get(full, Known()) for path, full in names.items()}, plan)
        results = [
            targets(block, outer, c, on_device(read(block, s)), plan.token_weights) for c, s in zip(chunks, exact)
        ]
        wanted, weights = kept([out for out, _ in results]), [w for _, w in results]
        given = zip(chunks, met, wanted, weights, strict=True)
        examples = [Examples(c, read(block, s), out, w) for c, s, out, w in given]
        student, report = _finished(student, outer, examples, plan, name, finished)
        reports.append(report)
        layers |= {names[path]: found for path, found in _host(_learned(student)).items()}
        exact = [put(block, s, out) for s, out in zip(exact, wanted, strict=True)]
        if plan.inputs == "propagated":
            made = kept([outputs(student, outer, e.inputs, on_device(e.part)) for e in examples])
            met = [put(block, s, out) for s, out in zip(met, made, strict=True)]
        else:
            met = exact
        if progress:
            progress("reconstructing", number + 1, count)
    return Reconstructed(layers, tuple(reports))


def _known(**found: Mapping[str, Any] | None) -> dict[str, Known]:
    """Everything that is known, by the names of layers."""
    names = {name for one in found.values() for name in one or ()}
    return {name: Known(**{kind: (one or {}).get(name) for kind, one in found.items()}) for name in names}


def _finished(student, outer, examples: Sequence[Examples], plan: Reconstruction, name: str, finished):
    """A prepared block as training leaves it, every rounding decided, and the report; trained, or read where it was
    kept."""
    known = None if finished is None else finished.get(name)
    if known is not None:
        learned, report = known
        nnx.update(student, _like(nnx.state(student, Learned), learned))
    else:
        student, report = _trained(student, outer, examples, plan, name)
        if finished is not None:
            finished.put(report, _flat(nnx.state(student, Learned)))
    return hardened(student), report


def _trained(student, outer, examples: Sequence[Examples], plan: Reconstruction, name: str):
    """A prepared block after training, and the report."""
    began = time.perf_counter()

    def chunks():
        return (dataclasses.replace(e, part=on_device(e.part), target=on_device(e.target)) for e in examples)

    def sums(block):
        """Squared error of the block as it would be deployed, and square of what it should change of the stream."""
        deployed = hardened(block)
        each = [relative_error(deployed, outer, chunk) for chunk in chunks()]
        return tuple(sum(parts) for parts in zip(*each, strict=True))

    count = sum(len(jax.tree.leaves(e.part)[0]) for e in examples)
    epochs = plan.epochs_of(count)
    steps = epochs * count
    # What a step does not read is the same in all plans, so that those that differ in it share their programs.
    rest = ("selection", "inputs", "memory", "batch", "epochs", "iterations", "features")
    defaults = {field.name: field.default for field in dataclasses.fields(plan) if field.name in rest}
    plan = dataclasses.replace(plan, token_weights=None, **defaults)
    if plan.estimation is not None and plan.estimation.gains == "formula":
        _start_gains(student, outer, chunks())
    state = start(student, plan=plan, steps=steps)
    nnx.update(student, state[0])
    error, square = sums(student)
    before = float(error / square)
    if jax.tree.leaves(state[0]):
        for _ in range(epochs):
            for chunk in chunks():
                state = train(state, student, outer, chunk, square / count, plan=plan, steps=steps)
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
        count += len(examples.part[0])
    for path, layer in iterate(student, ReconstructedLinear):
        if has_gains(layer):
            means = {name: sums / count for name, sums in total[dotted(path)].items()}
            layer.estimator.gain[...] = first_gains(**means) - 1


@jax.jit
def _learned(block: nnx.Module) -> dict[str, dict]:
    """What was learned of each layer, by its path in the block."""
    return {dotted(path): layer.learned() for path, layer in iterate(block, ReconstructedLayer)}


def _host(learned: Mapping[str, dict]) -> dict[str, dict]:
    return {name: jax.tree.map(to_host, found) for name, found in learned.items()}


def _blocks(model: VideoModel) -> Iterator[tuple[str, nnx.Module, dict[str, str]]]:
    """Name of every block, the block without a layer axis, and the full names of its layers by their paths.

    A block is a copy of its part of a stack, made when its turn comes. Names are diffusers'; of several blocks that
    have one there, with a number behind it.
    """
    shared = collections.Counter(stack.prefix for stack in model.stacks if stack.count is None)
    seen: collections.Counter = collections.Counter()
    for stack in model.stacks:
        for i in range(len(stack)):
            name, block, moved = stack.name(i), stack.layer(i), {}
            if stack.count is None and shared[stack.prefix] > 1:
                name = f"{name}.{seen[stack.prefix]}"
                seen[stack.prefix] += 1
            if isinstance(block, PartialBlock):
                block, moved = block.unplaced()
            paths = [path for path, _ in iterate(block, (Linear, Conv))]
            yield name, block, {dotted(path): stack.names(_placed(path, moved))[i] for path in paths}


def _placed(path: tuple, moved: Mapping[tuple, tuple]) -> tuple:
    """A path in a block under other names -> the path in the block itself (`PartialBlock.unplaced`)."""
    found = next((there for there in moved if path[: len(there)] == there), ())
    return (*moved.get(found, ()), *path[len(found) :])


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
