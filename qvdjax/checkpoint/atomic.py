"""Folders and files that appear under their final name complete, or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qvdjax.errors import UserError


def disk_error(path: Path, error: OSError) -> UserError:
    """What the user reads when `path` cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space or choose another target" if full else "choose a target that can be written"
    return UserError(f"{path} cannot be written: {error.strerror or error}", remedy=remedy)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError in the body into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`; what the body writes there replaces `path` when the body ends well.

    When it does not, nothing is left behind and a file that was there stays as it was. A process killed in
    between leaves at most a hidden `.<name>.partial-*`, which may be deleted.

    Raises:
        UserError: The file cannot be written, or the disk is full; an OSError of the body is taken for that.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with disk_errors(target):
            yield temporary
            os.replace(temporary, target)
    finally:
        # Where the folder is missing or unreadable there is nothing to remove; the first error is the one to show.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to `path` when the body ends well, removed when it does not.

    A process killed in between leaves at most a hidden `.<name>.partial-*` folder, which may be deleted. With
    `overwrite`, the old folder keeps its place until the new one is complete; it is then moved aside,
    replaced and deleted.

    Raises:
        UserError: `path` is a file, or a non-empty folder without `overwrite`; its parent cannot be written;
            the disk is full.
    """
    target = Path(path).resolve()
    with disk_errors(target):
        if target.is_dir():
            if any(target.iterdir()) and not overwrite:
                raise UserError(f"{target} exists and is not empty", remedy="choose another target or delete it first")
        elif target.exists():
            raise UserError(f"{target} exists and is no folder", remedy="choose another target")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield temporary
        with disk_errors(target):
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)  # mkdtemp makes folders private; this one is an ordinary one
            _rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, target: Path):
    if target.is_dir() and any(target.iterdir()):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside)
    else:
        os.rename(temporary, target)  # also onto an empty folder
