"""The training command: it writes a folder that loads, also when time runs out; options that make no sense."""

import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments.moving_shapes import data, train
from experiments.training.settings import Settings
from models.pipeline import Pipeline
from qvdjax.nn import Linear, layers_of

SMALL = {**train.CONFIGS["wan"], "num_layers": 1, "num_attention_heads": 1, "ffn_dim": 64}


@pytest.mark.parametrize("family", train.CONFIGS)
def test_the_shipped_architectures_are_small(family):
    model, config = models.abstract(train.CONFIGS[family]), train.CONFIGS[family]
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert count <= 2_000_000
    assert sum(map(len, model.stacks)) >= 6
    widths = {
        layer.weight.get_value().shape[-2] for _, _, layer in layers_of(model, (Linear,)) if layer.role == "query"
    }
    assert min(widths) // config["num_attention_heads"] >= 32


@pytest.mark.slow
def test_a_family_is_trained_for_the_solver_that_samples_it(tmp_path, monkeypatch):
    seen = []

    class Recording(train.Trainer):
        def __init__(self, model, settings, **more):
            small = {**train.CONFIGS["cogvideox"], "num_layers": 1, "num_attention_heads": 1}
            assert type(model.config).__name__ == "CogVideoXConfig"
            super().__init__(train.initial_model(0, small), settings, **more)
            seen.append(settings.objective.solver)

    monkeypatch.setattr(train, "Trainer", Recording)
    options = ["--family", "cogvideox", "--steps", "1", "--batch", "2", "--evaluate", "1"]
    train.main([str(tmp_path / "model"), *options])
    pipeline = Pipeline.load(tmp_path / "model")
    assert pipeline.solver == "ddim"
    assert seen == [pipeline.make_solver()]
    assert models.load(tmp_path / "model").config.patch == (3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("from_folder", [False, True])
def test_the_command_writes_a_folder_that_samples(tmp_path, capsys, from_folder):
    more = []
    if from_folder:
        data.main([str(tmp_path / "clips"), "--count", "8"])
        more = ["--data", str(tmp_path / "clips")]
    train.main([
        str(tmp_path / "model"), "--steps", "4", "--chunk", "2", "--batch", "2", "--evaluate", "2",
        "--checkpoints", str(tmp_path / "states"), "--log", str(tmp_path / "log.jsonl"), *more,
    ])  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["model", "train", "train", "saved", "scores"]
    assert lines == [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (tmp_path / "states" / "4").is_dir()
    model, pipeline = models.load(tmp_path / "model"), Pipeline.load(tmp_path / "model")
    context = pipeline.encode(["a red disc moving left"])
    latents = jnp.zeros((1, *pipeline.latents_shape))
    assert model(latents, jnp.array([500.0]), context).shape == (1, 9, 8, 8, 12)
    size = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    assert size <= 8 * 2**20


def test_time_that_runs_out_still_writes_the_folder(tmp_path, capsys, monkeypatch):
    small = train.initial_model(0, SMALL)
    monkeypatch.setattr(train, "initial_model", lambda seed, config: small)
    train.main([str(tmp_path / "model"), "--minutes", "0.0001", "--chunk", "1", "--batch", "1"])
    assert (tmp_path / "model" / "pipeline.json").exists()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "saved"
    assert events[-1]["step"] == 0


def test_a_total_that_is_planned_compiles_nothing_anew():
    """Weights of a folder are tied to a device; so must be everything that is put beside them later."""

    @jax.jit
    def run(state, steps):
        return {**state, "step": state["step"] + steps}, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1)}

    first = {"step": jnp.int32(0), "total": jnp.int32(2**30)}
    trainer = SimpleNamespace(
        start=lambda total: jax.device_put(first, jax.devices()[0]), advance=run, check=lambda state: None,
        settings=Settings(),
    )  # fmt: skip

    class Clock:
        """A log by which every look at the time takes half a second."""

        looks = itertools.count()
        events: list = []
        seconds = property(lambda self: next(self.looks) / 2)

        def __call__(self, **fields):
            self.events.append(fields)

    options = SimpleNamespace(
        steps=0, minutes=0.5, resume=False, checkpoints=None, data=None, chunk=1, save_every=1, batch=1
    )
    state = train.train(trainer, options, Clock())
    (plan,) = (event for event in Clock.events if event["event"] == "plan")
    assert int(state["total"]) == plan["total"] < 2**30
    assert run._cache_size() == 1


def test_training_starts_from_a_folder_with_the_frames_asked_for(tmp_path, capsys, monkeypatch):
    small, settings = train.initial_model(3, SMALL), []
    models.save(small, tmp_path / "start")

    class Recording(train.Trainer):
        def __init__(self, model, *args, **more):
            super().__init__(model, *args, **more)
            settings.append(self.settings)

    monkeypatch.setattr(train, "Trainer", Recording)
    options = ["--start", str(tmp_path / "start"), "--frames", "3", "--minutes", "0.0001"]  # no step fits
    train.main([str(tmp_path / "model"), *options])
    assert settings[0].frames == 3
    saved = models.load(tmp_path / "model")
    for one, other in zip(jax.tree.leaves(small), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "argv",
    [
        ["out"],
        ["out", "--steps", "3", "--resume"],
        ["out", "--steps", "3", "--recipe", "rtn-w4a4"],
        [".", "--steps", "3"],
        ["out", "--steps", "many"],
    ],
)
def test_unusable_options_end_with_code_two(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
