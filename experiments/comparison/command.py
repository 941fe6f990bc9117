"""The command lines of comparisons: what is to be run, and pages of what was."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.cli.values import seeds as parse_seeds
from experiments.comparison.results import RESULTS, file_of
from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be run.

    Attributes:
        model: Name of the shipped bench model.
        bits: Such as "w4a4".
        seeds: Of the runs.
        rows: Names of the table's rows.
        out: Folder of results.
        protocol: What all rows have in common.
    """

    model: str
    bits: str
    seeds: Sequence[int]
    rows: Sequence[str]
    out: Path
    protocol: Any

    def missing(self, seed: int) -> list[str]:
        """Rows that have no result with a seed."""
        return [name for name in self.rows if not file_of(self.out, name, seed).exists()]

    def keep(self, name: str, seed: int, found: dict[str, Any]) -> None:
        """Write a row's result with a seed."""
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        facts = {"row": name, "seed": seed, **found, "protocol": dataclasses.asdict(self.protocol), **versions}
        file_of(self.out, name, seed).write_text(json.dumps(facts, indent=1) + "\n")


def asked(
    argv: list[str] | None, *, program: str, purpose: str, rows: Callable[[str], Collection[str]], protocol: type,
    kind: str,
) -> Asked:  # fmt: skip
    """Parse the command line, and make the folder of results: docs/results/<kind>-<model>-<bits> by default.

    `rows` says which there are for a bench model, by its name; `protocol` is a dataclass with defaults.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=purpose, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, fields = parser.add_argument, dataclasses.fields(protocol)
    add("--model", default="wan", help="shipped bench model")
    add("--bits", default="w4a4", help="of weights and activations")
    add("--seeds", default="0-2", help="one, a list or a range")
    add("--rows", nargs="+", metavar="NAME", help="rows of the table (default: all of the model's)")
    add("--out", type=Path, help=f"folder of results (default: docs/results/{kind}-MODEL-BITS)")
    for field in fields:
        add(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default, help="see Protocol")
    options = vars(parser.parse_args(argv))
    known = list(rows(options["model"]))
    if unknown := [name for name in options["rows"] or () if name not in known]:
        parser.error(f"no rows of {options['model']}: {', '.join(unknown)}; there are {', '.join(known)}")
    common = protocol(**{field.name: options[field.name] for field in fields})
    out = options["out"] or RESULTS / f"{kind}-{options['model']}-{options['bits']}"
    out.mkdir(parents=True, exist_ok=True)
    return Asked(
        options["model"], options["bits"], parse_seeds(options["seeds"]), options["rows"] or known, out, common
    )


def run(main: Callable[[], None]) -> None:
    """Call a `main`; a mistake of the user's ends the process with code 2 and one line."""
    try:
        main()
    except UserError as error:
        print(f"comparison: {error}", file=sys.stderr)
        sys.exit(2)


def make_pages(
    arguments: Sequence[str] | None, *, program: str, purpose: str, kind: str, write: Callable[[Path], Sequence[Path]]
) -> int:
    """`write` the pages of the folders that are named, or of all of a kind; exit code 2 where there is nothing."""
    parser = argparse.ArgumentParser(prog=program, description=purpose)
    parser.add_argument("folders", type=Path, nargs="*", help="folders of results (default: all of docs/results)")
    try:
        for folder in parser.parse_args(arguments).folders or sorted(RESULTS.glob(f"{kind}-*")):
            print("\n".join(map(str, write(folder))))
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
