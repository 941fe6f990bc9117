"""The program `qvdjax`: parse, run the verb, answer in one place.

Exit codes: 0 done; 1 a threshold of `evaluate` was missed or a case of `bench` failed; 2 the input can be
mended (usage, files, values: one line on stderr says what and how); 70 an error of ours; 75 told to stop, its
state saved; 130 interrupted; 141 the reader of stdout went away. With `--json`, stdout holds exactly one JSON
object in every case, also for an error: {"error", "remedy", "items"}.
"""

import contextlib
import difflib
import errno
import functools
import importlib
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.cli import outcome as answer
from experiments.cli.arguments import Command
from experiments.cli.options import Common
from qvdjax.errors import UserError

DESCRIPTION = "Quantized video diffusion in JAX. `qvdjax VERB --help` explains a verb."

# The verb of a dataclass in `arguments`: module:function, imported after parsing.
VERBS = {
    "Convert": "experiments.cli.verbs.folders:convert",
    "Info": "experiments.cli.verbs.folders:info",
    "Export": "experiments.cli.verbs.folders:export",
    "Calibrate": "experiments.cli.verbs.quantizing:calibrate",
    "Quantize": "experiments.cli.verbs.quantizing:quantize",
    "Train": "experiments.cli.verbs.quantizing:train",
    "Recipes": "experiments.cli.verbs.quantizing:recipes",
    "Tabulate": "experiments.cli.verbs.folders:tabulate",
    "EncodePrompts": "experiments.cli.verbs.videos:encode_prompts",
    "EncodeVideos": "experiments.cli.verbs.videos:encode_videos",
    "Sample": "experiments.cli.verbs.videos:sample",
    "Compare": "experiments.cli.verbs.videos:compare",
    "Evaluate": "experiments.cli.verbs.videos:evaluate",
    "Web": "experiments.cli.verbs.web:web",
    "Score": "experiments.cli.verbs.videos:score",
    "VBench": "experiments.cli.verbs.videos:vbench",
    "Bench": "experiments.cli.verbs.machines:bench",
    "Plan": "experiments.cli.verbs.machines:plan",
}

# What to do about an operating system's refusal; anything else names the error and asks to check the path.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose a new name or remove it first",
    errno.ENOTEMPTY: "choose a new name or remove it first",
    errno.EACCES: "check its permissions or choose another place",
    errno.EPERM: "check its permissions or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOTDIR: "a part of this path is a file; choose another path",
    errno.EISDIR: "this is a folder; name a file",
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Arguments after the program's name; None takes the process's.
    """
    argv = _verb_first(sys.argv[1:] if argv is None else list(argv))
    json, debug = "--json" in argv, "--debug" in argv
    try:
        if argv == ["--version"]:
            print(f"qvdjax {_version()}")
            return answer.OK
        return run(parse(argv or ["--help"]))
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        error = UserError("interrupted", remedy="run the same command again")
        return _fail(error, json=json, code=answer.INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads stdout any more; give Python's shutdown somewhere to flush to.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return answer.BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the one place that turns any error into one line
        if debug:
            traceback.print_exc()
        mended = as_user_error(error)
        if mended is not None:
            return _fail(mended, json=json, code=mended.exit_code)
        message = f"internal error: {type(error).__name__}: {str(error)[:300]}"
        ours = UserError(message, remedy="run it again with --debug for the traceback and report it")
        return _fail(ours, json=json, code=answer.INTERNAL_ERROR)


def as_typed(name: str) -> str:
    """The verb of a dataclass in `arguments`: "EncodePrompts" -> "encode-prompts"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def parse(argv: Sequence[str]) -> Common:
    """Turn arguments into the dataclass of one verb.

    Raises:
        UserError: tyro's message, folded into one line.
        SystemExit: after `--help`, with code 0.
    """
    import tyro

    known = [as_typed(name) for name in VERBS]
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        near = difflib.get_close_matches(argv[0], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"there is no verb {argv[0]!r}", remedy=remedy)
    complaint = io.StringIO()
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Command, prog="qvdjax", description=DESCRIPTION, args=argv, config=config)
    except SystemExit as end:
        if not end.code:
            raise
        verb = f"{argv[0]} " if argv[0] in known else ""
        raise UserError(_folded(complaint.getvalue()), remedy=f"run qvdjax {verb}--help") from None


def run(arguments: Common) -> int:
    """Do the work of a parsed command, print its answer, return its exit code."""
    from experiments.cli.platforms import settle
    from experiments.cli.terminal import progress_bar, show

    _own_packages_first()
    settle()
    module, function = VERBS[type(arguments).__name__].split(":")
    with _only_our_words(arguments):
        verb: Callable = getattr(importlib.import_module(module), function)
        with progress_bar() as progress:
            outcome = verb(arguments, progress)
    if arguments.json:
        print(answer.to_json(outcome.report), flush=True)
    else:
        show(outcome.lines)
        sys.stdout.flush()
    for line in outcome.missed:
        print(f"qvdjax: {line}", file=sys.stderr)
    return outcome.exit_code


def as_user_error(error: Exception) -> UserError | None:
    """The error as something the user can mend, or None where it is ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        where = f": {error.filename}" if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0, "check that the path can be read and written")
        return UserError(f"{reason}{where}", remedy=remedy)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        remedy = "use fewer frames or a smaller size, a recipe with fewer bits, or --mesh over more devices"
        return UserError("out of memory", remedy=remedy)
    return None


def _fail(error: UserError, *, json: bool, code: int) -> int:
    if json:
        report = {"error": error.message, "remedy": error.remedy, "items": error.items}
        print(answer.to_json(report), flush=True)
    print(f"qvdjax: {error}", file=sys.stderr)
    return code


def _folded(box: str) -> str:
    """The message in tyro's box on one line: without the frame, the title and the pointers to the help."""
    rows = [re.sub(r"[│╭╮╰╯]", " ", row).strip() for row in box.splitlines()[1:]]
    parts = " ".join(";" if re.fullmatch(r"[─\-\s]*", row) else row for row in rows).split(";")
    said = [part for part in (" ".join(part.split()) for part in parts) if part]
    kept = [part for part in said if not part.startswith(("For full helptext", "Argument helptext"))]
    return "; ".join(kept).rstrip(".") or "the arguments were not understood"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qvdjax")
    except PackageNotFoundError:
        raise UserError("qvdjax runs from its sources", remedy="install it: pip install -e .") from None


def _verb_first(argv: list[str]) -> list[str]:
    # `qvdjax --json info DIR` means what `qvdjax info DIR --json` means.
    leading = []
    while len(argv) > 1 and argv[0] in ("--json", "--debug"):
        leading.append(argv.pop(0))
    return argv + leading


def _own_packages_first() -> None:
    # Run as `python -m` or with PYTHONPATH, a folder of the user's called `models` can stand before ours.
    root = Path(__file__).resolve().parents[2]
    for name in ("models", "conversion"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != root / name:
            sys.path.insert(0, str(root))
            importlib.invalidate_caches()
            return


@contextlib.contextmanager
def _only_our_words(arguments: Common) -> Iterator[None]:
    """Keep other packages' prints off stdout under --json, and their warnings off stderr without --debug."""
    import logging
    import warnings

    with contextlib.ExitStack() as stack:
        if arguments.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not arguments.debug:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for name in ("jax", "flax"):
                logging.getLogger(name).setLevel(logging.ERROR)
            for name in ("absl", "orbax", "asyncio"):  # what Orbax logs of an error it raises too
                logging.getLogger(name).setLevel(logging.CRITICAL)
            if getattr(sys.unraisablehook, "func", None) is not _unraisable:
                # For good: what is still under way when the command is over complains after it.
                sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
        yield


def _unraisable(show: Callable, unraisable: Any) -> None:
    # Where one of the reads or writes of a state fails, Orbax closes its event loop without waiting for the others,
    # and each of those complains when it is done.
    if str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)


if __name__ == "__main__":
    sys.exit(main())
