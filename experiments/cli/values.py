"""Values that are typed as text: seeds, meshes, prompts, overrides of a recipe."""

import re
from collections.abc import Sequence
from pathlib import Path

from qvdjax.errors import UserError

MOST_SEEDS = 10_000
SETTINGS = (
    "steps", "guidance_scale", "shift", "solver", "sigma_grid", "frames", "height", "width",
    "negative_prompt", "dynamic_guidance", "guidance_until", "first_frame_guidance",
)  # fmt: skip
LARGEST_SEED = 2**31 - 1  # what jax.random.key takes where 64-bit integers are off


def seeds(text: str) -> list[int]:
    """ "7" -> [7]; "1,2,5" -> [1, 2, 5]; "0-4" -> [0, 1, 2, 3, 4]; parts may be mixed.

    Raises:
        UserError: anything else, a range that runs backwards, or a seed named twice.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UserError(f"--seeds {text!r} is not a list of seeds", remedy="write it like 7, 1,2,5 or 0-4")
        if last > LARGEST_SEED or last - first >= MOST_SEEDS:
            remedy = f"name at most {MOST_SEEDS} seeds, none above {LARGEST_SEED}"
            raise UserError(f"--seeds {text!r} goes too far", remedy=remedy)
        found += range(first, last + 1)
    if len(set(found)) != len(found):
        raise UserError(f"--seeds {text!r} names a seed twice", remedy="name each seed once")
    return found


def video(text: str | None) -> tuple[int, int, int] | None:
    """ "81x480x832" -> (81, 480, 832), frames, height and width; None stays None.

    Raises:
        UserError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*", text)
    if match is None:
        raise UserError(f"--video {text!r} is no size", remedy="write frames, height and width like 81x480x832")
    return tuple(int(part) for part in match.groups())


def mesh(text: str | None) -> dict[str, int] | None:
    """As `qvdjax.parallel.parse_mesh`; None stays None."""
    if text is None:
        return None
    from qvdjax.parallel import parse_mesh

    return parse_mesh(text)


def prompts(given: Sequence[str], file: Path | None) -> list[str] | None:
    """The prompts typed or those of a file, one a line, empty lines left out; None where there are neither.

    Raises:
        UserError: both are given, or the file holds no prompt or is not text.
        OSError: the file cannot be read.
    """
    if given and file is not None:
        raise UserError("both --prompt and --prompts are given", remedy="give one of them")
    if file is None:
        return list(given) or None
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file in UTF-8", remedy="give one prompt a line") from None
    if not any(lines):
        raise UserError(f"{file} holds no prompt", remedy="write one prompt a line")
    return [line for line in lines if line]


def processes(
    distributed: bool, coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, str | int] | None:
    """How `qvdjax.parallel.initialize_distributed` joins the processes; {} where jax finds that out, None for one.

    Raises:
        UserError: some of the three are missing or do not fit each other, or are given beside --distributed.
    """
    given = {
        "coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id,
    }  # fmt: skip
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    remedy = (
        "give --coordinator-address HOST:PORT, --num-processes N and --process-id I, or --distributed alone where jax"
        " finds them itself"
    )
    if len(missing) == len(given):
        return {} if distributed else None
    if distributed:
        raise UserError("--distributed finds all processes itself, and some are named beside it", remedy=remedy)
    if missing:
        raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing", remedy=remedy)
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator-address {coordinator_address!r} is not HOST:PORT", remedy="write it like 10.0.0.1:8476"
        )
    if num_processes < 1:
        raise UserError(f"--num-processes is {num_processes}", remedy="give at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id is {process_id} of {num_processes} processes",
            remedy=f"number them from 0 to {num_processes - 1}",
        )
    return given


def overrides(pairs: Sequence[str]) -> dict[str, str]:
    """["alpha=0.7", "skip=a=b"] -> {"alpha": "0.7", "skip": "a=b"}; the recipe knows the types.

    Raises:
        UserError: a pair without "=", without a name, or a name given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--set {pair!r} is not KEY=VALUE", remedy="write it like --set alpha=0.7")
        if key in found:
            raise UserError(f"--set gives {key} twice", remedy="give it once")
        found[key] = value
    return found
