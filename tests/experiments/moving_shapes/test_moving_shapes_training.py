"""Training: it learns, continues bit for bit, distils, and writes a folder that loads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from experiments.moving_shapes import data, train
from experiments.moving_shapes.objective import Objective
from experiments.moving_shapes.training import Settings, Trainer, last_state, save_state
from models.pipeline import Pipeline
from qvdjax.errors import UserError

SMALL = {**train.CONFIG, "num_layers": 1, "num_attention_heads": 1, "ffn_dim": 64}
SETTINGS = Settings(batch=2, learning_rate=3e-3, warm_up=5, average=0.9)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(train.initial_model(0, SMALL), SETTINGS)


def equal(one, other):
    return all(
        bool((a == b).all()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_the_shipped_architecture_is_small():
    model = models.abstract(train.CONFIG)
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert count <= 2_000_000
    assert train.CONFIG["num_layers"] >= 6
    assert train.CONFIG["attention_head_dim"] >= 32


def test_loss_goes_down(trainer):
    state, first = trainer.advance(trainer.start(40), 4)
    state, _ = trainer.advance(state, 32)
    _, last = trainer.advance(state, 4)
    # A model that predicts nothing loses E(e - x)^2 = 1 + E x^2, about 1.6; knowing the noise saves 1 of it.
    assert first > 1.1
    assert last < 0.85 * first


def test_runs_continue_bit_for_bit(trainer, tmp_path):
    whole, _ = trainer.advance(trainer.start(10), 10)
    part, _ = trainer.advance(trainer.start(10), 3)
    save_state(tmp_path, part)
    empty = jax.tree.map(jnp.zeros_like, trainer.start(99))  # everything must come from the file
    restored = last_state(tmp_path, empty)
    assert int(restored["step"]) == 3
    assert int(restored["total"]) == 10
    continued, _ = trainer.advance(restored, 7)
    assert equal(whole, continued)


def test_no_checkpoint_is_none_and_a_strangers_is_refused(trainer, tmp_path):
    like = trainer.start(1)
    assert last_state(tmp_path, like) is None
    save_state(tmp_path, like)
    with pytest.raises(UserError, match="another training") as refusal:
        last_state(tmp_path, {**like, "params": {"strange": jnp.zeros(3)}})
    assert "params.strange" in refusal.value.items
    assert any(item.startswith("params.proj_out.weight") for item in refusal.value.items)


def test_steps_on_given_batches_are_the_steps_by_rule(trainer):
    ruled, _ = trainer.advance(trainer.start(10), 2)
    state = trainer.start(10)
    for step in range(2):
        state, _ = trainer.advance_on(state, data.batch(SETTINGS.seed, step, SETTINGS.batch))
    for a, b in zip(jax.tree.leaves(ruled["params"]), jax.tree.leaves(state["params"]), strict=True):
        # Two programs of the same arithmetic; Adam's first steps are +-rate, so a gradient near zero that is
        # rounded otherwise may move a weight by a part of 2 x 3e-3 x 2/5.
        np.testing.assert_allclose(a, b, atol=2.5e-3)


def test_rate_warms_up_and_ends_low():
    settings = Settings(warm_up=10, learning_rate=1.0, final_rate=0.01)
    rates = [float(settings.rate(jnp.int32(step), jnp.int32(100))) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_the_average_follows_slowly(trainer):
    state, _ = trainer.advance(trainer.start(10), 5)
    shift = lambda name: sum(  # noqa: E731
        float(jnp.abs(a - b).sum())
        for a, b in zip(jax.tree.leaves(state[name]), jax.tree.leaves(trainer.initial), strict=True)
    )
    assert 0 < shift("average") < shift("params")


@pytest.fixture(scope="module")
def examples():
    return data.batch(0, 0, 4)


def test_the_perfect_model_loses_nothing(examples):
    captured = {}

    def oracle(noisy, timestep, context):
        level = (timestep / 1000)[:, None, None, None, None]
        captured["timestep"] = timestep
        return (noisy - examples["latents"]) / level  # x_s - x = s (e - x)

    loss = Objective()(oracle, examples, jax.random.key(0))
    # Divided by levels down to about 0.1: rounding of 1e-7 / 0.1, squared.
    assert loss < 1e-10
    assert ((captured["timestep"] > 0) & (captured["timestep"] < 1000)).all()


def test_levels_are_those_of_a_shifted_sampler():
    levels = np.sort(np.asarray(Objective(shift=3.0).levels(jax.random.key(0), 1000)))
    u = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(
        levels, 3 * u / (1 + 2 * u), atol=2e-3
    )  # one in each thousandth, slope up to 3


def test_dropped_captions_reach_the_model_as_zeros(examples):
    seen = []

    def model(noisy, timestep, context):
        seen.append(np.asarray(context))
        return noisy

    Objective(drop_caption=1.0)(model, examples, jax.random.key(0))
    Objective(drop_caption=0.0)(model, examples, jax.random.key(0))
    assert not seen[0].any()
    assert (seen[1] == examples["context"]).all()
    many = {name: jnp.repeat(value, 250, axis=0) for name, value in examples.items() if name == "context"}
    many["latents"] = jnp.zeros((1000, 1, 1, 1, 1))
    Objective(drop_caption=0.1)(model, many, jax.random.key(0))
    dropped = 1 - seen[2].any(axis=(1, 2)).mean()
    assert 0.06 < dropped < 0.14  # four deviations of a thousand coins


def test_distillation_moves_a_rounded_student_towards_the_teacher():
    teacher = train.initial_model(3, SMALL)
    teacher.proj_out.weight[...] = 0.1 * jax.random.normal(jax.random.key(0), teacher.proj_out.weight.shape)
    settings = dataclasses.replace(SETTINGS, objective=Objective(data=0.0, teacher=1.0))
    rounded = train.student_of(teacher, "rtn-w4a4")

    @jax.jit
    def loss(student):
        return settings.objective(student, data.batch(0, 0, 2), jax.random.key(0), teacher)

    # The same function twice in one program, fused otherwise: float32 rounding, squared.
    assert loss(teacher) < 1e-10
    assert loss(rounded(nnx.clone(teacher))) > 1e-5
    trainer = Trainer(teacher, settings, teacher=teacher, student=rounded)
    state, first = trainer.advance(trainer.start(60), 4)
    state, _ = trainer.advance(state, 52)
    _, last = trainer.advance(state, 4)
    assert last < 0.8 * first


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
    assert model(jnp.zeros((1, *pipeline.latents_shape)), jnp.array([500.0]), context).shape == (
        1,
        9,
        12,
        12,
        27,
    )
    size = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    assert size <= 8 * 2**20


def test_time_that_runs_out_still_writes_the_folder(tmp_path, capsys, monkeypatch):
    small = train.initial_model(0, SMALL)
    monkeypatch.setattr(train, "initial_model", lambda seed: small)
    train.main([str(tmp_path / "model"), "--minutes", "0.0001", "--chunk", "1", "--batch", "1"])
    assert (tmp_path / "model" / "pipeline.json").exists()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1]["event"] == "saved"
    assert events[-1]["step"] == 0


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
