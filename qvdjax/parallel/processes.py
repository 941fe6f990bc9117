"""What the processes of one run agree on: failing together, and having been told the same."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from qvdjax.errors import UserError

Result = TypeVar("Result")
# Words of the errors that transports and the coordination service give when a process is gone.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")


def together(task: Callable[..., Result], *args: Any, **more: Any) -> Result:
    """`task(*args, **more)` on every process; where it fails on one, it fails on all, and none waits for another.

    Every process has to call this, in the same order as everything else that they do together. The task itself must
    not do such things, or fail on all processes alike where it does.

    Raises:
        UserError: The task failed on another process and not on this one.
        Exception: What the task raised here.
    """
    if jax.process_count() == 1:
        return task(*args, **more)
    result, failure = None, None
    try:
        result = task(*args, **more)
    except Exception as error:  # noqa: BLE001 - raised again below
        failure = error
    for process, said in enumerate(_exchange("" if failure is None else json.dumps(_as_fields(failure)))):
        if said and failure is None:
            fields = json.loads(said)
            raise UserError(f"process {process}: {fields['message']}", remedy=fields["remedy"], items=fields["items"])
    if failure is not None:
        raise failure
    return result


def on_first(task: Callable[..., Result], *args: Any, **more: Any) -> Result | None:
    """`task(*args, **more)` on process 0 while the others wait: what concerns files that only it writes.

    Returns:
        The result on process 0, None on the others.

    Raises:
        UserError: It failed there.
    """
    return together(lambda: task(*args, **more) if jax.process_index() == 0 else None)


def to_host(array: jax.Array) -> np.ndarray:
    """A whole array in the memory of every process. All have to call this where some of it lies on others' devices."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


@contextlib.contextmanager
def with_the_others() -> Iterator[None]:
    """The body trains with other processes; where one of them has ended, that is what is said.

    Raises:
        UserError: A collective failed because nobody was at its other end.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not any(word in str(error) for word in _LOST):
            raise
        first_line = " ".join(str(error).splitlines()[0].split())[:200]
        raise UserError(
            f"another process of this run has ended ({first_line})",
            remedy="look at what it says, then start all of them again",
        ) from error


def check_same(what: str, options: Mapping[str, Any]) -> None:
    """Compare what every process was given with what process 0 was; otherwise they would wait for each other forever.

    Args:
        what: Its name in the message.
        options: Name to value; values are compared as text.

    Raises:
        UserError: On all of them, where one differs.
    """
    if jax.process_count() == 1:
        return
    here = {name: str(value) for name, value in options.items()}
    first, *others = map(json.loads, _exchange(json.dumps(here)))
    items = [
        f"{name}: {first.get(name)} on process 0, {other.get(name)} on process {process}"
        for process, other in enumerate(others, start=1)
        for name in sorted(first | other)
        if first.get(name) != other.get(name)
    ]
    if items:
        raise UserError(
            f"the processes have different {what}", remedy="give all of them the same command and the same files",
            items=items,
        )  # fmt: skip


def _as_fields(error: Exception) -> dict[str, Any]:
    if isinstance(error, UserError):
        return {"message": error.message, "remedy": error.remedy, "items": error.items}
    remedy = "look at what that process says"
    return {"message": f"{type(error).__name__}: {str(error)[:300]}", "remedy": remedy, "items": ()}


def _exchange(text: str) -> list[str]:
    """What every process said, by its number."""
    from jax.experimental import multihost_utils

    encoded = text.encode()
    lengths = multihost_utils.process_allgather(np.int32(len(encoded)))  # processes
    if not lengths.any():
        return [""] * len(lengths)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = multihost_utils.process_allgather(padded)  # processes, longest
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths)]
