"""What the pages say can be typed, can be typed; what they link to is there; the README's example runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli.main import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")])
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page, language):
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands(page):
    """Lines of the shell blocks that run qvdjax, without their comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("qvdjax ")]


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_parse(page, line):
    assert parse(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_compile(page):
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")


def test_named_modules_exist():
    # `qvdjax/...`, `models/...` and so on between backticks are files or folders.
    for page in PAGES:
        named = re.findall(r"`((?:qvdjax|models|conversion|experiments|tests|docs)/[\w/.\-]*)`", page.read_text())
        for name in named:
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readmes_example_runs_as_printed(tmp_path):
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.splitlines()) <= 14
    # Run where its output may lie; the shipped models are found as from a clone.
    shipped = Path("experiments", "moving_shapes", "checkpoints")
    (tmp_path / shipped.parent).mkdir(parents=True)
    (tmp_path / shipped).symlink_to(ROOT / shipped)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from qvdjax.video import read_mp4

    frames = read_mp4(tmp_path / "clip.mp4").frames
    assert frames.shape[0] == 9
    assert frames.std() > 5  # of 255: something is drawn
