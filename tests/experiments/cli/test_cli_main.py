"""What the program does around a verb: usage errors, exit codes, one line on stderr, one object on stdout."""

import errno
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from experiments.cli import main as program
from experiments.cli.outcome import Outcome, Table
from qvdjax.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"jax", "flax", "numpy", "optax", "orbax", "grain", "av", "matplotlib", "safetensors"}


@pytest.fixture
def verb(monkeypatch):
    """Let the verb `recipes` be a function of the test."""

    def install(function):
        module = types.ModuleType("a_verb_for_tests")
        module.act = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(program.VERBS, "Recipes", "a_verb_for_tests:act")

    return install


def raising(error):
    def act(arguments, progress):
        raise error

    return act


def run(*argv, capsys):
    code = program.main(argv)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("argv", [[], ["--help"], *([program.as_typed(name), "--help"] for name in program.VERBS)])
def test_help_imports_nothing_heavy(argv):
    # Import time is what makes a program slow to answer, and it does not depend on how busy the machine is.
    code = (
        "import sys; from experiments.cli.main import main; code = main(sys.argv[1:]);"
        "print(*sorted(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: qvdjax")
    assert not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("name", program.VERBS)
def test_help_tells_every_option_and_its_default(name, capsys):
    code, out, err = run(program.as_typed(name), "--help", capsys=capsys)
    assert (code, err) == (0, "")
    options = re.split(r"\n\W*(?=--?\w)", out.split(" options ")[-1])[1:]
    assert len(options) > 2
    for option in options:
        assert re.search(r"default:|\(required\)|\(repeatable\)|--help", option), option


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["info"], ["DIR", "qvdjax info --help"]),
        (["info", "a", "b"], ["Unrecognized", "b"]),
        (["info", "a", "--bogus"], ["--bogus"]),
        (["quantise", "a"], ["quantise", "did you mean quantize"]),
        (["nothing-like-it"], ["nothing-like-it", "convert"]),
        (["--bogus"], ["--bogus"]),
        (["quantize", "a", "b"], ["--recipe"]),
        (["convert", "a", "b", "--dtype", "int3"], ["int3", "bfloat16"]),
        (["sample", "a", "-o", "b.mp4", "--steps", "many"], ["--steps", "many"]),
        (["plan", "--model", "m", "--recipe", "r"], ["--topology"]),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_usage_errors_are_one_line(argv, names, as_json, capsys):
    code, out, err = run(*argv, *["--json"] * as_json, capsys=capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("qvdjax: ")
    assert all(name in err for name in names)
    assert not set("│╭╰─") & set(err)
    if as_json:
        assert set(json.loads(out)) == {"error", "remedy", "items"}
    else:
        assert out == ""


def test_json_may_stand_before_the_verb(verb, capsys):
    verb(lambda arguments, progress: Outcome({"json": arguments.json}))
    for argv in (["--json", "recipes"], ["recipes", "--json"]):
        code, out, err = run(*argv, capsys=capsys)
        assert (code, json.loads(out), err) == (0, {"json": True}, "")


def test_a_user_error_is_one_line_and_all_names_are_in_the_json(verb, capsys):
    names = [f"blocks.{i}.weight" for i in range(40)]
    verb(raising(UserError("keys\nare missing", remedy="convert it again", items=names)))
    code, out, err = run("recipes", capsys=capsys)
    assert (code, out) == (2, "")
    first = "blocks.0.weight, blocks.1.weight, blocks.2.weight"
    assert err == f"qvdjax: keys are missing (40: {first}, ...); convert it again\n"
    code, out, err = run("recipes", "--json", capsys=capsys)
    assert json.loads(out) == {"error": "keys\nare missing", "remedy": "convert it again", "items": names}
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/no/where"), 2, "/no/where; check the path"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc"), 2, "/etc; check its permissions"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 2, "x.bin; free some space"),
        (OSError("something odd"), 2, "something odd; check"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 2, "out of memory"),
        (ValueError("a\nb"), 70, "internal error: ValueError: a b; run it again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(verb, error, code, said, capsys):
    verb(raising(error))
    for flags in ([], ["--json"]):
        got, out, err = run("recipes", *flags, capsys=capsys)
        assert got == code
        assert said in err
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert out == "" if not flags else set(json.loads(out)) == {"error", "remedy", "items"}


def test_debug_shows_the_traceback_and_keeps_the_code(verb, capsys):
    for error, code in ((UserError("bad", remedy="mend it"), 2), (KeyError("oops"), 70)):
        verb(raising(error))
        got, _, err = run("recipes", "--debug", capsys=capsys)
        assert got == code
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1].startswith("qvdjax: ")


def test_a_missed_threshold_is_exit_code_1(verb, capsys):
    verb(lambda arguments, progress: Outcome({"passed": False}, missed=["psnr 20 is below 30"]))
    code, out, err = run("recipes", "--json", capsys=capsys)
    assert (code, json.loads(out), err) == (1, {"passed": False}, "qvdjax: psnr 20 is below 30\n")


def test_stdout_holds_one_object_whatever_others_print(verb, capsys):
    def chatty(arguments, progress):
        import warnings

        print("a library's own words")
        warnings.warn("a library's warning", stacklevel=1)
        odd = {"infinite": float("inf"), "nan": float("nan"), "tuple": (1, 2)}
        return Outcome({"path": Path("a/b"), **odd})

    verb(chatty)
    _, out, err = run("recipes", "--json", capsys=capsys)
    assert json.loads(out) == {"path": "a/b", "infinite": None, "nan": None, "tuple": [1, 2]}
    assert out.count("\n") == 1
    assert err == "a library's own words\n"


def test_arrays_become_lists():
    import jax.numpy as jnp
    import numpy as np

    from experiments.cli.outcome import to_json

    report = {"a": np.float32(0.5), "b": jnp.arange(3), "c": np.array([[1.0, np.nan]]), "d": np.int64(3)}
    assert json.loads(to_json(report)) == {"a": 0.5, "b": [0, 1, 2], "c": [[1.0, None]], "d": 3}
    with pytest.raises(TypeError, match="object"):
        to_json({"a": object()})


def test_a_table_is_drawn_in_full_away_from_a_terminal(verb, capsys):
    long = "blocks." + "x" * 300
    verb(lambda arguments, progress: Outcome({}, [Table(("path", "bytes"), [(long, 12), ("[b]", 3)]), "done"]))
    code, out, _ = run("recipes", capsys=capsys)
    assert code == 0
    assert long in out.splitlines()[1]
    assert "[b]" in out.splitlines()[2]  # not read as rich's markup
    assert out.splitlines()[-1] == "done"


def test_no_bar_away_from_a_terminal(verb, capsys):
    verb(lambda arguments, progress: Outcome({"bar": progress is not None}))
    assert json.loads(run("recipes", "--json", capsys=capsys)[1]) == {"bar": False}


def test_a_reader_that_goes_away(tmp_path):
    # `qvdjax recipes | head -1`: the reader closes while the table is still being written.
    code = (
        "import sys, types; from experiments.cli import main as program\n"
        "from experiments.cli.outcome import Outcome\n"
        "module = types.ModuleType('a_verb'); sys.modules['a_verb'] = module\n"
        "module.act = lambda arguments, progress: Outcome({}, ['line'] * 200_000)\n"
        "program.VERBS['Recipes'] = 'a_verb:act'; sys.exit(program.main(['recipes']))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait() == 141


def test_a_folder_called_models_in_the_way(tmp_path):
    # The user's own packages may carry the names of ours: they are neither imported nor in the way.
    for name in ("models", "conversion"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')")
    command = (
        "import sys; sys.path.insert(0, '')\n"
        "from experiments.cli.main import main; code = main(sys.argv[1:])\n"
        "import models, conversion; print(models.__file__, file=sys.stderr); sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", command, "recipes", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert Path(done.stderr.strip()).parent == ROOT / "models"
