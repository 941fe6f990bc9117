"""`qvdjax train`: the trained folder is nearer to its teacher, continues bit for bit, and bad input is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from experiments.cli.main import main
from experiments.quantizing import quantize_folder
from experiments.training import train_folder
from experiments.training.latents import DataFolder

ROOT = Path(__file__).parents[3]
WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = {"batch": 6, "learning_rate": 5e-4, "warm_up": 4}


def distance(folder, teacher, data):
    """Mean squared distance of two models' predictions from the same noisy latents, relative to the teacher's."""
    examples = [DataFolder(data)[number] for number in range(6)]
    latents, context = (jnp.stack([one[name] for one in examples]) for name in ("latents", "context"))
    noise = jax.random.normal(jax.random.key(9), latents.shape)
    level = jnp.linspace(0.2, 0.95, 6)
    s = level[:, None, None, None, None]
    inputs = ((1 - s) * latents + s * noise, 1000 * level, context)
    wanted, found = (jax.jit(lambda model: model(*inputs))(models.load(one)) for one in (teacher, folder))
    return float(jnp.square(found - wanted).mean() / jnp.square(wanted).mean())


@pytest.fixture(scope="module")
def whole(model_folder, data_folder, tmp_path_factory):
    """A run of 40 steps that nobody interrupts."""
    folder = tmp_path_factory.mktemp("trained")
    calls = []
    report = train_folder(
        model_folder, folder / "w4a4", "rtn-w4a4", data_folder, steps=40, log=folder / "log.jsonl",
        progress=lambda *call: calls.append(call), **SETTINGS,
    )  # fmt: skip
    return {"folder": folder / "w4a4", "log": folder / "log.jsonl", "report": report, "calls": calls}


def test_training_brings_the_rounded_model_nearer_to_its_teacher(whole, model_folder, data_folder, tmp_path):
    report = whole["report"]
    assert report["last_loss"] < report["first_loss"]
    quantize_folder(model_folder, tmp_path / "plain", "rtn-w4a4")
    before, after = (distance(folder, model_folder, data_folder) for folder in (tmp_path / "plain", whole["folder"]))
    # The same codes and ranges, other weights; the noise differs from every step's.
    assert after < before


def test_the_trained_folder_is_one_that_quantize_would_write(whole, model_folder, tmp_path):
    quantize_folder(model_folder, tmp_path / "plain", "rtn-w4a4")
    trained, plain = (load_file(folder / WEIGHTS) for folder in (whole["folder"], tmp_path / "plain"))
    assert {k: (v.shape, v.dtype) for k, v in trained.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    config, wanted = (json.loads((f / "config.json").read_text()) for f in (whole["folder"], tmp_path / "plain"))
    assert config == wanted
    for name in ("pipeline.json", "word_table.safetensors"):
        assert (whole["folder"] / name).read_bytes() == (model_folder / name).read_bytes()
    assert whole["report"]["quantized_layers"] > 0
    assert whole["report"]["ratio"] < 1  # most of so small a model stays float


def test_the_log_and_the_progress_tell_every_tenth_step(whole):
    lines = [json.loads(line) for line in whole["log"].read_text().splitlines()]
    train = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in train] == [10, 20, 30, 40]
    assert all(line["seconds_per_step"] > 0 and line["gradient_norm"] > 0 for line in train)
    # Six examples of 2 x 2 x 2 video tokens and 8 text tokens, width 24, hidden 48, two blocks; three passes of the
    # student and one of the teacher, two operations a multiply-add.
    tokens, text, width, hidden = 8, 8, 24, 48
    linear = tokens * width * (6 * width + 2 * hidden) + text * 2 * width**2
    flops = 6 * 4 * 2 * 2 * (linear + 2 * tokens * (tokens + text) * width)
    assert train[0]["model_flops_per_second"] == pytest.approx(flops / train[0]["seconds_per_step"])
    rates = [line["rates"]["weights"] for line in train]
    assert rates[0] > rates[1] > rates[-1] == pytest.approx(SETTINGS["learning_rate"] / 100, rel=0.2)
    assert lines[0]["loss"] == whole["report"]["first_loss"]
    assert lines[-1]["event"] == "saved"
    assert [call for call in whole["calls"] if call[0] == "training"][-1] == ("training", 40, 40)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(whole, model_folder, data_folder, tmp_path):
    def run(out, **more):
        options = {"steps": 40, "checkpoints": tmp_path / "states", "save_every": 7, **SETTINGS, **more}
        return train_folder(model_folder, tmp_path / out, "rtn-w4a4", data_folder, **options)

    def interrupt(stage, done, total):
        if (stage, done) == ("training", 20):  # between two states
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["14", "7", "run.json"]
    report = run("out", resume=True)
    assert report["first_step"] == 14
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (whole["folder"] / WEIGHTS).read_bytes()
    # A finished run whose folder was lost is written again without a step.
    report = run("again", resume=True)
    assert (report["first_step"], report["last_loss"]) == (40, None)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (whole["folder"] / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_mesh_trains_what_one_device_trains_and_another_goes_on(model_folder, data_folder, tmp_path):
    def run(out, **more):
        options = {"steps": 6, "batch": 4, "learning_rate": 1e-3, "warm_up": 1, **more}
        return train_folder(model_folder, tmp_path / out, "qvgen-w4a16", data_folder, overrides={"rank": 4}, **options)

    alone = run("alone")
    spread = run("spread", mesh="data=2,fsdp=2,tensor=2", accumulate=1, remat=True)
    # Sums in another order, six steps of Adam.
    assert spread["last_loss"] == pytest.approx(alone["last_loss"], rel=1e-3)
    with pytest.raises(KeyboardInterrupt):
        run("part", mesh="fsdp=4", checkpoints=tmp_path / "states", save_every=3, progress=_interrupt_at_end)
    again = run("again", mesh="data=2", checkpoints=tmp_path / "states", resume=True)
    assert again["first_step"] == 3
    one, other = (load_file(tmp_path / out / WEIGHTS) for out in ("alone", "again"))
    assert one.keys() == other.keys()
    scales = [name for name in one if name.endswith("weight_scale")]
    for name in scales:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-2)  # moved by six rates of 1e-3 at most
    narrow = run("narrow", mesh="fsdp=2", accumulate=2, dtype="bfloat16")
    assert narrow["last_loss"] == pytest.approx(alone["last_loss"], rel=0.2)  # bfloat16 has 8 bits


def _interrupt_at_end(stage, done, total):
    if (stage, done) == ("training", total):  # before the last state is written
        raise KeyboardInterrupt


@pytest.mark.slow
def test_processes_killed_and_told_to_stop_go_on_to_the_same_bits(whole, model_folder, data_folder, tmp_path):
    states, log = tmp_path / "states", tmp_path / "log.jsonl"
    options = {"--steps": 40, "--batch": 6, "--learning-rate": 5e-4, "--warm-up": 4, "--save-every": 3,
               "--recipe": "rtn-w4a4", "--data": data_folder, "--checkpoints": states, "--log": log}  # fmt: skip
    argv = [sys.executable, "-m", "experiments.cli.main", "train", model_folder, tmp_path / "out", "--resume"]
    argv = [str(word) for word in (*argv, *(word for pair in options.items() for word in pair))]

    def saved():
        return max((int(path.name) for path in states.glob("*") if path.name.isdigit()), default=0)

    def start_and_send(number, step):
        process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 300
        while saved() < step and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=900), process.stderr.read()

    code, _ = start_and_send(signal.SIGKILL, 6)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    killed_at = saved()
    code, error = start_and_send(signal.SIGTERM, killed_at + 6)
    assert code == 75, error
    assert "told to stop after step" in error
    assert f"{saved()};" in error or f"{saved()} " in error
    assert not (tmp_path / "out").exists()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (whole["folder"] / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_disk_that_is_full_is_said_in_one_line(model_folder, data_folder, tmp_path):
    # No file grows beyond 64 KiB: to a program that writes, a disk that is full.
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16));"
        "from experiments.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", program, "train", model_folder, tmp_path / "out", "-r", "rtn-w4a4"]
    argv += ["--data", data_folder, "--batch", 2, "--steps", 2, "--checkpoints", tmp_path / "states"]
    done = subprocess.run([str(word) for word in argv], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{tmp_path / 'states' / '2'} cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_stays_float_keeps_its_type(model_folder, data_folder, tmp_path):
    half = shutil.copytree(model_folder, tmp_path / "half")
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(model_folder / WEIGHTS).items()}
    save_file(tensors, half / WEIGHTS)
    train_folder(half, tmp_path / "w8a8", "rtn-w8a8", data_folder, steps=1, **SETTINGS)
    trained = load_file(tmp_path / "w8a8" / WEIGHTS)
    assert trained["patch_embedding.weight"].dtype == ml_dtypes.bfloat16
    assert trained["blocks.0.attn1.to_q.bias"].dtype == ml_dtypes.bfloat16
    assert trained["blocks.0.attn1.to_q.weight"].dtype == np.int8
    assert trained["blocks.0.attn1.to_q.weight_scale"].dtype == np.float32


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the program; it must end with code 2, one line that holds the words, and no OUT."""

    def run(*argv, words):
        code = main(["train", *(str(argument) for argument in argv)])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), err
        for word in words:
            assert str(word) in err
        assert not (tmp_path / "out").exists()

    return run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "minmax-w8a8"], ["calibration", "rtn-w4a4"]),
        (["--recipe", "smoothquant-w4a4"], ["calibration", "rtn-w4a4"]),
        (["--recipe", "rtn-w44"], ["rtn-w44"]),
        (["--recipe", "rtn-w4a4", "--set", "skip=nowhere"], ["nowhere"]),
        (["--recipe", "rtn-w4a4", "--steps", "0"], ["--steps"]),
        (["--recipe", "rtn-w4a4", "--batch", "0"], ["--batch"]),
        (["--recipe", "rtn-w4a4", "--learning-rate", "nan"], ["--learning-rate"]),
        (["--recipe", "rtn-w4a4", "--warm-up", "-1"], ["--warm-up"]),
        (["--recipe", "rtn-w4a4", "--data-weight", "-1"], ["--data-weight"]),
        (["--recipe", "rtn-w4a4", "--seed", "-1"], ["--seed"]),
        (["--recipe", "rtn-w4a4", "--save-every", "0"], ["--save-every"]),
        (["--recipe", "rtn-w4a4", "--accumulate", "0"], ["--accumulate"]),
        (["--recipe", "rtn-w4a4", "--batch", "8", "--accumulate", "3"], ["3 micro-batches", "batch of 8"]),
        (["--recipe", "rtn-w4a4", "--batch", "6", "--mesh", "fsdp=4"], ["batch of 6", "4 devices"]),
        (["--recipe", "rtn-w4a4", "--mesh", "fsdp=99"], ["99", "devices"]),
        (["--recipe", "qvgen-w4a4", "--steps", "9"], ["phases", "9 steps"]),
        (["--recipe", "qvgen-w4a4", "--set", "phases=keep"], ["phases=keep"]),
        (["--recipe", "rtn-w4a4", "--resume"], ["checkpoints"]),
        (["--recipe", "rtn-w4a4", "--data", "missing"], ["missing", "manifest.json"]),
    ],
)
def test_options_that_make_no_sense_are_refused(
    refused, model_folder, data_folder, tmp_path, monkeypatch, options, words
):
    # Before anything expensive: reading weights would fail here with another exit code.
    monkeypatch.setattr(models, "load", lambda *args, **more: sys.exit("weights were read"))
    refused(model_folder, tmp_path / "out", "--data", data_folder, *options, words=words)


def test_models_that_cannot_be_trained_are_refused(refused, whole, data_folder, tmp_path):
    refused(whole["folder"], tmp_path / "out", "-r", "rtn-w4a4", "--data", data_folder, words=["quantized already"])
    refused(tmp_path / "none", tmp_path / "out", "-r", "rtn-w4a4", "--data", data_folder, words=[tmp_path / "none"])


@pytest.mark.parametrize(
    ("shape", "words"),
    [({"channels": 5}, ["12 channels"]), ({"dim": 9}, ["text embeddings", "8"]), ({"frames": 2000}, ["frames 2000"])],
)
def test_data_that_does_not_fit_is_refused(refused, model_folder, write_latents, tmp_path, shape, words):
    data = write_latents(tmp_path / "data", count=1, **shape)
    refused(model_folder, tmp_path / "out", "-r", "rtn-w4a4", "--data", data, words=words)


def test_targets_that_are_taken_or_cannot_be_written_are_refused(model_folder, data_folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("here first")
    for out, word in ((tmp_path / "full", "not empty"), (tmp_path / "full" / "file" / "out", "cannot be written")):
        argv = ["train", str(model_folder), str(out), "-r", "rtn-w4a4", "--data", str(data_folder)]
        assert main(argv) == 2
        assert word in capsys.readouterr().err
    assert (tmp_path / "full" / "file").read_text() == "here first"


def test_a_loss_that_is_not_finite_ends_the_run(refused, model_folder, data_folder, tmp_path):
    options = ["--steps", "10", "--batch", "2", "--warm-up", "0", "--learning-rate", "1e30"]
    refused(
        model_folder, tmp_path / "out", "-r", "rtn-w4a4", "--data", data_folder, *options,
        words=["step 10", "not been finite for 9 steps", "lower the learning rate"],
    )  # fmt: skip


def test_the_program_trains(model_folder, data_folder, tmp_path, capsys):
    options = ["--steps", "2", "--batch", "2", "--data-weight", "0.5", "--set", "skip=blocks\\.0\\..*", "--json"]
    argv = ["train", model_folder, tmp_path / "out", "--recipe", "rtn-w4a4", "--data", data_folder, *options]
    assert main([str(argument) for argument in argv]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["recipe"], report["steps"], report["first_step"], report["examples"]) == ("rtn-w4a4", 2, 0, 6)
    assert np.isfinite(report["last_loss"])
    bits = {row["path"]: row["weight_bits"] for row in report["layers"]}
    assert (bits["blocks.0.attn1.to_q"], bits["blocks.1.attn1.to_q"]) == (32, 4)
    assert models.skeleton(tmp_path / "out").recipe_name == "rtn-w4a4"
