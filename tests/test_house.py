"""The house keeps its shape: four storeys whose imports only go down, small documented files, and a library
that knows no model by name."""

import ast
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STOREYS = ("qvdjax", "models", "conversion", "experiments")  # lowest first
FAMILIES = ("wan", "cogvideo", "cogvideox", "hunyuan", "hunyuanvideo", "animatediff", "modelscope")
MOST_LINES = 600

FILES = sorted(path for storey in STOREYS for path in (ROOT / storey).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names of all modules a source imports, anywhere in it; `package` resolves relative imports.

    A string that spells a module of one of the storeys counts too: lazy imports hold such strings.
    """
    found = set()
    spelled = re.compile(rf"({'|'.join(STOREYS)})(\.[A-Za-z_]\w*)+(:\w+)?")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and spelled.fullmatch(node.value):
            found.add(node.value.partition(":")[0])
    return found


def storeys_above(path: Path, source: str) -> set[str]:
    """Imports of `source`, a file at `path` below the root, that go up."""
    package = ".".join(path.parent.parts)
    above = STOREYS[STOREYS.index(path.parts[0]) + 1 :]
    modules = imported_modules(source, package)
    return {module for module in modules if module.partition(".")[0] in (*above, "tests")}


def family_names(source: str) -> list[str]:
    """Names of model families in the code of a source: identifiers and strings, not docstrings or comments,
    which may say where a formula was found."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node, clean=False) is not None
    }
    words = []
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        for _, value in ast.iter_fields(node):
            values = value if isinstance(value, list) else [value]
            words += [word for word in values if isinstance(word, str)]
    # "WanBlock", "load_wan" and "wan2.1" all name the family; "want" and "swan" do not.
    pattern = re.compile(rf"(?<![a-z])({'|'.join(FAMILIES)})(?![a-z])", re.IGNORECASE)
    forms = [(word, re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", word)) for word in words]
    return [word for word, split in forms if pattern.search(word) or pattern.search(split)]


def test_all_four_storeys_stand():
    assert {name.split("/")[0] for name in NAMES} == set(STOREYS)


@pytest.mark.parametrize("name", NAMES)
def test_imports_only_go_down(name):
    assert not storeys_above(Path(name), (ROOT / name).read_text())


# FVD and LPIPS are defined by files of PyTorch's. It is imported when one of them is asked for, and nowhere else.
READS_PYTORCH_FILES = "experiments/video_metrics/weights.py"


@pytest.mark.parametrize("name", [name for name in NAMES if name != READS_PYTORCH_FILES])
def test_torch_stays_outside(name):
    roots = {module.partition(".")[0] for module in imported_modules((ROOT / name).read_text(), "")}
    assert not roots & {"torch", "diffusers", "transformers"}


@pytest.mark.parametrize("name", NAMES)
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(ast.parse((ROOT / name).read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_no_file_is_long(name):
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= MOST_LINES or "kernels" in Path(name).parts


def test_files_are_short_as_a_rule():
    assert statistics.median(len(path.read_text().splitlines()) for path in FILES) < 200


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("qvdjax/")])
def test_the_library_knows_no_model_by_name(name):
    assert not family_names((ROOT / name).read_text())


def test_every_folder_of_code_is_a_package():
    # Without an __init__.py a folder works here and is missing from a built wheel.
    assert not [str(path.parent) for path in FILES if not (path.parent / "__init__.py").exists()]


@pytest.mark.parametrize(
    ("path", "source", "caught"),
    [
        ("qvdjax/nn/linear.py", "import models", {"models"}),
        ("qvdjax/nn/linear.py", "def f():\n    from experiments.cli import main", None),
        ("qvdjax/linear.py", "from .. import models", {"models"}),
        ("models/wan.py", "LAZY = {'convert': 'conversion.wan:convert'}", {"conversion.wan"}),
        ("models/wan.py", "from qvdjax import nn\nfrom . import registry", set()),
        ("conversion/wan.py", "import models.wan, qvdjax.nn", set()),
        ("experiments/demo.py", "import conversion, models, qvdjax", set()),
    ],
)
def test_imports_that_go_up_are_caught(path, source, caught):
    found = storeys_above(Path(path), source)
    assert found if caught is None else found == caught


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ('"""Following Wan\'s block."""  # as Wan does', False),
        ("def load_wan(): ...", True),
        ("class WanBlock: ...", True),
        ("x = 'wan2.1-14b'", True),
        ("from somewhere import wan", True),
        ("wanted = swan = 'what we want'", False),
        ("def f():\n    '''Wan.'''\n    return 'CogVideoX'", True),
    ],
)
def test_families_in_code_are_caught(source, caught):
    assert bool(family_names(source)) == caught
