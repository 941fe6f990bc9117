"""The page in a browser: the program as users start it, a preset, two players in step, the table."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.web import markup
from experiments.web.answer import answer
from experiments.web.pair import open_pair
from experiments.web.question import read_question

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ROOT = Path(__file__).parents[3]
STEPS, SEED = 2, 5
PATIENCE = 300_000  # milliseconds; compiling both samplers takes some 10 seconds on one idle core
STATES = """() => [...document.querySelectorAll("video.in-step")].map(
    ({paused, currentTime, readyState, duration, error}) => ({paused, currentTime, readyState, duration, error}))"""


def missing() -> str:
    """Why the page cannot be tested here; empty where it can."""
    packages = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    if packages:
        return f"not installed: {', '.join(packages)}"
    return "" if any(map(shutil.which, BROWSERS)) else f"no browser on PATH: {', '.join(BROWSERS)}"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")]


@pytest.fixture(scope="module")
def address(shipped, tmp_path_factory):
    """Where `qvdjax web` serves the page; ends the process, which must leave nothing behind."""
    temporary = tmp_path_factory.mktemp("temporary")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = "import sys; from experiments.cli.main import main; sys.exit(main())"  # what installs as `qvdjax`
    command = [sys.executable, "-c", program, "web", shipped.wan, shipped.w4a4, "--port", port]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    said = process.stdout.readline()
    found = re.match(r"http://\S+", said)
    if found is None:
        process.kill()
    assert found, said
    yield found[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not list(temporary.glob("qvdjax-web-*"))


@pytest.fixture(scope="module")
def page(address):
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(address)
        yield page
        chromium.close()


def fill(page, name, value):
    page.locator(f"#{name}").locator("input, textarea").first.fill(value)


def wait_for(page, condition: str):
    """Until a condition on the players' states, named `one` and `two`, holds."""
    page.wait_for_function(f"() => {{ const [one, two] = ({STATES})(); return {condition}; }}")


@pytest.fixture(scope="module")
def answered(page):
    """The page after a preset was chosen and the button pressed."""
    page.locator("#preset input").click()
    page.get_by_role("option").nth(1).click()
    page.wait_for_function("() => document.querySelector('#prompt textarea').value.startsWith('a ')")
    fill(page, "steps", str(STEPS))
    fill(page, "seed", str(SEED))
    page.locator("#sample").click()
    page.locator("#metrics table").wait_for(timeout=PATIENCE)
    wait_for(page, "one.readyState === 4 && two.readyState === 4")
    return page


def test_what_cannot_be_asked_is_answered_in_words(page):
    fill(page, "steps", "0")
    fill(page, "prompt", " ")
    page.locator("#sample").click()
    page.locator("#videos .problem", has_text="the prompt is empty").wait_for()
    fill(page, "prompt", "the red disc")
    page.locator("#sample").click()
    page.locator("#videos .problem", has_text="steps is 0").wait_for()
    fill(page, "steps", str(STEPS))
    page.locator("#sample").click()
    page.locator("#videos .problem", has_text="does not know some words").wait_for()
    assert "Traceback" not in page.content()


def test_the_table_says_what_the_plain_function_says(answered, shipped, tmp_path):
    pair = open_pair(shipped.wan, shipped.w4a4)
    prompt = answered.locator("#prompt textarea").input_value()
    assert prompt == pair.presets[1]
    truth = markup.rows(answer(pair, read_question(prompt, SEED, STEPS, pair.guidance_scale), tmp_path))
    shown = [row.locator("th, td").all_inner_texts() for row in answered.locator("#metrics tbody tr").all()]
    assert [row[0] for row in shown] == [row[0] for row in truth]
    for (name, *found), (_, *wanted) in zip(shown, truth, strict=True):
        if name.startswith("seconds"):  # another run's
            assert all(float(value) >= 0 for value in found)
        elif name.startswith("weight"):
            assert found == wanted
        else:
            # The same program on the same machine: four digits are shown, the last of which may round otherwise.
            assert float(found[1]) == pytest.approx(float(wanted[1]), rel=2e-3)
    assert truth[0][0].startswith("PSNR")
    assert 5 < float(shown[0][2]) < 60  # a quantized model's, neither equal nor noise


def test_both_videos_play(answered):
    one, two = answered.evaluate(STATES)
    assert one["error"] is two["error"] is None
    # 9 frames, 8 a second.
    assert one["duration"] == two["duration"] == pytest.approx(9 / 8, abs=0.01)


def test_one_player_moves_the_other(answered):
    first, second = (answered.locator("video.in-step").nth(index) for index in (0, 1))
    second.evaluate("player => { player.currentTime = 0.5; }")
    wait_for(answered, "one.currentTime === 0.5 && two.currentTime === 0.5")
    first.evaluate("player => { player.currentTime = 0.25; }")
    wait_for(answered, "one.currentTime === 0.25 && two.currentTime === 0.25")
    # Dragging: the follower's own events, which come late, must not pull the leader back.
    second.evaluate("""async player => { for (let at = 1; at < 9; at++) {
        player.currentTime = at / 8;
        await new Promise((go) => setTimeout(go, 5));
    } }""")
    wait_for(answered, "one.currentTime === 1 && two.currentTime === 1")
    first.evaluate("player => { player.currentTime = 0.25; }")
    wait_for(answered, "one.currentTime === 0.25 && two.currentTime === 0.25")
    first.evaluate("player => player.play()")
    wait_for(answered, "!one.paused && !two.paused && one.currentTime > 0.3 && two.currentTime > 0.3")
    second.evaluate("player => { player.pause(); }")
    wait_for(answered, "one.paused && two.paused && one.currentTime === two.currentTime")
    second.evaluate("player => { player.playbackRate = 0.5; }")
    answered.wait_for_function("() => document.querySelector('video.in-step').playbackRate === 0.5")
