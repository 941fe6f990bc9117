"""`qvdjax train` on two processes: the run of one process, the files of the first, a stop and an error of either."""

import contextlib
import json
import os
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from two_hosts import ended, two_hosts

import experiments.training
import qvdjax.parallel
from experiments.cli import terminal
from experiments.cli.main import main
from experiments.training import train_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = 30


@pytest.fixture
def start(model_folder, data_folder, tmp_path):
    """start(out, *options, own=...) runs `qvdjax train` on two hosts; `own(rank)` are options of one of them."""

    def run(out, *options, own=lambda rank: ()):
        def command(rank, address):
            joined = ("--coordinator-address", address, "--num-processes", 2, "--process-id", rank)
            folders = (model_folder, tmp_path / out, "--data", data_folder, "--recipe", "rtn-w4a4")
            settings = ("--batch", 4, "--steps", STEPS, "--learning-rate", 5e-4, "--warm-up", 4)
            main = ("-m", "experiments.cli.main", "train")
            return (*main, *folders, *settings, *joined, *options, *own(rank))

        return two_hosts(command)

    return run


@pytest.mark.slow
def test_two_hosts_train_what_one_trains_and_go_on_when_one_is_stopped(start, model_folder, data_folder, tmp_path):
    def own(rank):
        return ("--log", tmp_path / f"log-{rank}.jsonl", "--tensorboard", tmp_path / f"curves-{rank}", "--json")

    with start("whole", own=own) as both:
        (code, out, error), (other_code, other_out, other_error) = ended(both)
    assert (code, other_code) == (0, 0), error + other_error
    report = json.loads(out)
    assert json.loads(other_out)["last_loss"] == report["last_loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves-0", "log-0.jsonl", "whole"]
    lines = [json.loads(line) for line in (tmp_path / "log-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [10, 20, 30]

    alone = train_folder(
        model_folder, tmp_path / "alone", "rtn-w4a4", data_folder, batch=4, steps=STEPS, learning_rate=5e-4, warm_up=4,
        mesh="fsdp=4",
    )  # fmt: skip
    assert report["last_loss"] == pytest.approx(alone["last_loss"], rel=1e-3)
    one, two = (load_file(tmp_path / out / WEIGHTS) for out in ("alone", "whole"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], err_msg=name)

    states = tmp_path / "states"
    kept = ("--checkpoints", states, "--save-every", 4, "--resume")
    with start("out", *kept) as both:
        until = time.monotonic() + 300
        while not (states / "4").exists() and all(host.poll() is None for host in both):
            assert time.monotonic() < until
            time.sleep(0.02)
        both[1].send_signal(signal.SIGTERM)
        for code, _, error in ended(both):
            assert code == 75, error
            assert "told to stop after step" in error
    assert not (tmp_path / "out").exists()
    stopped = max(int(path.name) for path in states.iterdir() if path.name.isdigit())
    assert 4 < stopped < STEPS
    with start("out", *kept, "--json") as both:
        (code, out, error), (other_code, _, other_error) = ended(both)
    assert (code, other_code) == (0, 0), error + other_error
    assert json.loads(out)["first_step"] == stopped
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "code", "said"),
    [
        (("--data", "nowhere"), 2, "process 1: nowhere has no readable manifest.json"),
        (("--steps", "9"), 2, "the processes have different options (1: steps: 30 on process 0, 9 on process 1)"),
    ],
)
def test_what_is_wrong_on_one_host_ends_both(start, tmp_path, own, code, said):
    with start("out", own=lambda rank: own if rank else ()) as both:
        (first, _, error), (second, _, _) = ended(both)
    assert (first, second) == (code, code)
    assert said in error
    assert not os.listdir(tmp_path)


def test_processes_are_joined_first_and_the_first_one_tells(monkeypatch, capsys):
    called, report = [], {"recipe": "rtn-w4a4", "last_loss": 0.5}

    @contextlib.contextmanager
    def bars():
        yield lambda stage, done, total: None

    def train_folder(*args, progress, **more):
        called.append(progress)
        return report

    monkeypatch.setattr(qvdjax.parallel, "initialize_distributed", lambda **joined: called.append(joined) or 1)
    monkeypatch.setattr(experiments.training, "train_folder", train_folder)
    monkeypatch.setattr(terminal, "progress_bar", bars)
    argv = ["train", "DIR", "OUT", "-r", "rtn-w4a4", "--data", "DATA"]
    joined = ["--coordinator-address", "host:8476", "--num-processes", "2", "--process-id", "1"]
    assert main([*argv, *joined]) == 0
    assert called == [{"coordinator_address": "host:8476", "num_processes": 2, "process_id": 1}, None]
    assert capsys.readouterr() == ("", "")
    called.clear()
    assert main([*argv, "--distributed", "--json"]) == 0
    assert called == [{}, None]
    assert json.loads(capsys.readouterr().out) == report
    assert main([*argv, "--distributed", *joined]) == 2
    assert "--distributed finds all processes itself" in capsys.readouterr().err
