"""What the page shows of an answer, and the verb where gradio or the port is missing."""

import re
import socket
import sys
from pathlib import Path

import pytest

from experiments.cli.main import main
from experiments.web import markup
from experiments.web.answer import Answer, Side
from experiments.web.question import Question
from qvdjax.errors import UserError

ANSWER = Answer(
    question=Question("a <b> & c", seed=7, steps=2, guidance_scale=3.0),
    reference=Side("full", None, Path("x/reference.mp4"), 1.5, 2.0, 4000),
    candidate=Side("small", "rtn-w4a4", Path("x/candidate.mp4"), 0.5, 1.0, 1000),
    psnr=23.456789,
    ssim=0.9,
    relative_error=0.0123,
)


def test_players_stand_side_by_side_under_their_labels():
    html = markup.players(ANSWER, address=lambda file: f"/files/{file.name}")
    assert re.findall(r'<video class="in-step" src="([^"]*)"', html) == ["/files/reference.mp4", "/files/candidate.mp4"]
    assert re.findall("<strong>(.*?)</strong>", html) == ["full precision", "rtn-w4a4"]
    assert "a &lt;b&gt; &amp; c" in html
    assert "<b>" not in html


def test_rows_hold_every_number():
    assert markup.rows(ANSWER) == [
        ["PSNR, dB", "", "23.46"],
        ["SSIM", "", "0.9"],
        ["relative squared error", "", "0.0123"],
        ["seconds to sample", "1.5", "0.5"],
        ["seconds to compile", "2", "1"],
        ["weight bytes", "4,000", "1,000"],
    ]
    html = markup.metrics(ANSWER)
    assert all(f">{cell}<" in html for row in markup.rows(ANSWER) for cell in row if cell)


def test_a_problem_is_said_with_its_remedy():
    html = markup.problem(UserError("steps <0>", remedy="give more"))
    assert 'role="alert"' in html
    assert "steps &lt;0&gt;; give more" in html


def test_without_gradio_the_verb_says_what_to_install(shipped, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # an import of it fails then
    assert main(["web", str(shipped.wan), str(shipped.w4a4)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'qvdjax[web]'" in error
    assert error.count("\n") == 1


def test_folders_and_ports_that_cannot_be_are_refused(shipped, capsys):
    pytest.importorskip("gradio", reason="the page needs gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, said in (
            ((shipped.cogvideox,), "a cogvideox model"),
            ((shipped.w4a4, "--port", "70000"), "--port 70000 is no port"),
            ((shipped.w4a4, "--port", port), f"port {port} of 127.0.0.1"),
        ):
            assert main(["web", str(shipped.wan), *map(str, options)]) == 2
            assert said in capsys.readouterr().err
