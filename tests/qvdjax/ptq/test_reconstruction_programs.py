"""Programs of blocks are let go where there are many kinds of them: they fill up a process's regions of memory."""

import jax
import jax.numpy as jnp

from qvdjax.nn import Linear
from qvdjax.ptq.reconstruction import programs


def layer(width: int, seed: int = 0) -> Linear:
    return Linear(width, 4, role="query", axes=("heads", "embed"), key=jax.random.key(seed))


def test_only_a_new_kind_of_block_lets_go(monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    call = jax.jit(lambda block, x: block(x))
    held = programs.Programs((call,))
    sizes = []
    for width, seed in ((3, 0), (3, 1), (5, 0), (3, 2), (7, 0)):
        block = layer(width, seed)
        held.enter(block)
        call(block, jnp.ones((2, width)))
        sizes.append(call._cache_size())
    assert sizes == [1, 1, 2, 2, 1]
