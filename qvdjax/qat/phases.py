"""From one phase of rank decay to the next: every Phi of a model, with what the optimizer keeps about it."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn.variables import shape_of
from qvdjax.parallel import partition_spec
from qvdjax.qat.orthogonal import reorthogonalize, singular_values, small_share
from qvdjax.qat.phi import Factor
from qvdjax.qat.rank_decay import RankDecay

SecondMoments = Literal["follow", "reset"]

# Fields of optax's states: averages of gradients (Adam and Muon; momentum), averages of squared gradients.
_MOMENTS = {"mu": "gradients", "trace": "gradients", "nu": "squares"}


def begin_step(
    params: nnx.State, optimizer: Any, step: jax.Array | int, decay: RankDecay, *, averages: Sequence[nnx.State] = (),
    second_moments: SecondMoments = "follow",
) -> tuple[nnx.State, Any, tuple[nnx.State, ...]]:  # fmt: skip
    """What a training step does first: nothing, or, where a phase starts, cut and orthogonalise every Phi.

    Works inside `jax.jit` with a traced step; the work is behind one `lax.cond`. What the model computes with the
    step's gates does not change. With the mesh in scope (`jax.set_mesh`) rows of factors stay on their devices.

    The release decomposes again too, but writes the result into a copy of the parameters that its sharded optimizer
    overwrites a step later, and leaves the optimizer's moments in the old basis; here everything follows.

    Args:
        params: The trained parameters; pairs of `Factor`s named `left` and `right` are the Phis.
        optimizer: optax's state of these parameters, or None.
        step: Number of the step that is about to be done.
        decay: The schedule.
        averages: Averages of the parameters; they follow as points.
        second_moments: "follow" by the squared change of basis, or "reset" to zero. Adam's correction of the bias
            counts steps for all parameters together, so after a reset the first steps of the factors are about
            1 / sqrt(1 - b2) times too long; the default follows.

    Returns:
        params, optimizer and averages, the factors' entries changed.

    Raises:
        ValueError: The optimizer keeps something about factors that is neither a first nor a second moment.
        UserError: Factors of another rank than the schedule's.
    """
    if second_moments not in get_args(SecondMoments):
        remedy = f"choose {', '.join(get_args(SecondMoments))}"
        raise UserError(f"second moments cannot {second_moments!r}", remedy=remedy)
    kept, rebuild = jax.tree.flatten(optimizer, is_leaf=_is_state)
    kinds = ["factors"] * (1 + len(averages)) + [_kind(path) for path, _ in _leaves(optimizer)]
    flat = [dict(nnx.to_flat_state(tree)) if _is_state(tree) else {} for tree in (params, *averages, *kept)]
    sites = [path[:-1] for path, leaf in flat[0].items() if isinstance(leaf, Factor) and path[-1] == "left"]
    if not sites:
        return params, optimizer, tuple(averages)
    blocks = {}
    for site in sites:
        left, right = flat[0][(*site, "left")], flat[0][(*site, "right")]
        if shape_of(left)[-1] != decay.rank:
            message = f"Phi at {'.'.join(map(str, site))} has rank {shape_of(left)[-1]}, its decay has {decay.rank}"
            raise UserError(message, remedy="give both the same rank")
        blocks[site] = (_devices(left, -2), _devices(right, -1))

    def pairs_of(entries: dict) -> dict:
        held = {site: [entries.get((*site, name)) for name in ("left", "right")] for site in sites}
        return {s: tuple(f.get_value() for f in pair) for s, pair in held.items() if isinstance(pair[0], Factor)}

    pairs = [pairs_of(entries) for entries in flat]
    if unknown := [kind for kind, held in zip(kinds, pairs) if held and kind not in ("factors", *_MOMENTS.values())]:
        raise ValueError(f"what follows a change of basis is not known of the optimizer's {', '.join(unknown)}")

    def crossed(pairs: list[dict]) -> list[dict]:
        out = [{} for _ in pairs]
        for site in sites:
            active = decay.active_rank(step)
            left, right, change = reorthogonalize(*pairs[0][site], active, blocks=blocks[site])
            out[0][site] = (left, right)
            for kind, held, new in zip(kinds[1:], pairs[1:], out[1:]):
                if site not in held:
                    continue
                reset = kind == "squares" and second_moments == "reset"
                moved = map(jnp.zeros_like, held[site]) if reset else getattr(change, kind)(*held[site])
                new[site] = tuple(new.astype(old.dtype) for new, old in zip(moved, held[site]))
        return out

    moved = jax.lax.cond(decay.starts_phase(step), crossed, lambda pairs: pairs, pairs)
    trees = [
        _with_pairs(tree, entries, new) if new else tree
        for tree, entries, new in zip((params, *averages, *kept), flat, moved)
    ]
    count = 1 + len(averages)
    return trees[0], jax.tree.unflatten(rebuild, trees[count:]), tuple(trees[1:count])


def small_share_of_phi(params: nnx.State, rank: jax.Array) -> jax.Array:
    """`small_share` of the first `rank` singular values of each Phi, their mean over all Phis, float32 ()."""
    flat = dict(nnx.to_flat_state(params))
    sites = [path[:-1] for path, leaf in flat.items() if isinstance(leaf, Factor) and path[-1] == "left"]
    shares = []
    for site in sites:
        values = singular_values(flat[(*site, "left")].get_value(), flat[(*site, "right")].get_value())
        shares.append(small_share(values, alive=jnp.minimum(rank, values.shape[-1])).reshape(-1))  # [layers] or [1]
    return jnp.concatenate(shares).mean()


def _with_pairs(tree: nnx.State, entries: dict, pairs: dict) -> nnx.State:
    new = {
        (*site, name): entries[(*site, name)].replace(value)
        for site, pair in pairs.items()
        for name, value in zip(("left", "right"), pair)
    }
    return nnx.from_flat_state(entries | new)


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_state)


def _kind(path: tuple) -> str:
    name = str(getattr(path[-1], "name", path[-1])) if path else "state"
    return _MOMENTS.get(name, name)


def _is_state(node: Any) -> bool:
    return isinstance(node, nnx.State)


def _devices(factor: Factor, dimension: int) -> int:
    """Over how many devices a dimension of a factor is spread, by the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    spec, _ = partition_spec(shape_of(factor), factor.get_metadata()["axes"], mesh)
    names = spec[dimension] or ()
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))
