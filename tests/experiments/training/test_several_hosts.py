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
STEPS = 12
SETTINGS = {"batch": 4, "steps": STEPS, "learning_rate": 5e-4, "warm_up": 4}


@pytest.fixture
def start(model_folder, data_folder, tmp_path, tmp_path_factory):
    """start(out, *options, own=...) runs `qvdjax train` on two hosts; `own(rank)` are options of one of them."""
    # Compiling is most of so short a run: what one run has compiled the next one reads.
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip

    def run(out, *options, own=lambda rank: ()):
        def command(rank, address):
            joined = ("--coordinator-address", address, "--num-processes", 2, "--process-id", rank)
            folders = (model_folder, tmp_path / out, "--data", data_folder, "--recipe", "rtn-w4a4")
            settings = (word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value))
            return ("-m", "experiments.cli.main", "train", *folders, *settings, *joined, *options, *own(rank))

        return two_hosts(command, **compiled)

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
    assert [line["step"] for line in lines if line["event"] == "train"] == [10, 12]

    alone = train_folder(
        model_folder, tmp_path / "alone", "rtn-w4a4", data_folder, mesh="fsdp=4", log=tmp_path / "log-alone.jsonl",
        **SETTINGS,
    )  # fmt: skip
    # Gloo sums the float32 gradients of four devices in another order, which changes their last bits. A step of Adam
    # moves a weight by 5e-4 at most and by a part of 1e-6 otherwise; 1e-7 was seen. Where a gradient is hardly more
    # than its rounding the part is larger, and a weight may then pass an edge between two codes.
    reported = [json.loads(line)["loss"] for line in (tmp_path / "log-alone.jsonl").read_text().splitlines()[:2]]
    assert [line["loss"] for line in lines[:2]] == pytest.approx(reported, rel=1e-4)
    assert report["last_loss"] == lines[1]["loss"] == pytest.approx(alone["last_loss"], rel=1e-4)
    one, two = (load_file(tmp_path / out / WEIGHTS) for out in ("alone", "whole"))
    assert one.keys() == two.keys()
    for name in one:
        if one[name].dtype.kind == "f":
            np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert sum(int((two[name] != one[name]).sum()) for name in one if one[name].dtype.kind != "f") <= 2

    states = tmp_path / "states"
    kept = ("--checkpoints", states, "--save-every", 2, "--resume")
    with start("out", *kept) as both:
        until = time.monotonic() + 300
        while not (states / "2").exists() and all(host.poll() is None for host in both):
            assert time.monotonic() < until
            time.sleep(0.02)
        both[1].send_signal(signal.SIGTERM)
        for code, _, error in ended(both):
            assert code == 75, error
            assert "told to stop after step" in error
    assert not (tmp_path / "out").exists()
    stopped = max(int(path.name) for path in states.iterdir() if path.name.isdigit())
    assert 2 < stopped < STEPS
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
        (("--steps", "9"), 2, "the processes have different options (1: steps: 12 on process 0, 9 on process 1)"),
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
