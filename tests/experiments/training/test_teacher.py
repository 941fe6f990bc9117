"""The teacher of a run: as codes it takes less memory, as predictions on disk none, and the student learns the same."""

import dataclasses
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file

import models
import qvdjax
from experiments.cli.main import main
from experiments.training import train_folder
from experiments.training.latents import DataFolder, stream
from experiments.training.objective import Objective
from experiments.training.settings import Settings
from experiments.training.teacher import frozen, held_bytes, prediction_of, predictor, teacher_recipe
from experiments.training.teaching import teaching_of
from qvdjax.checkpoint import CheckpointFolder, fingerprint
from qvdjax.errors import UserError
from qvdjax.nn import QuantizedLinear, layers_of
from qvdjax.parallel import make_mesh, place, shardings

WEIGHTS = "diffusion_pytorch_model.safetensors"
SETTINGS = Settings(batch=4, objective=Objective(data=0.0, teacher=1.0))


def leaf_bytes(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_of_codes_holds_a_byte_a_weight_and_no_float_copy(dtype):
    model = small_models.wan(num_layers=1)
    plain, quantized = (frozen(model, teacher_recipe(name), dtype) for name in (None, "rtn-w8a16"))
    width = jnp.dtype(dtype).itemsize
    layers = [layer for _, _, layer in layers_of(quantized, (QuantizedLinear,))]
    assert layers
    saved = 0
    for layer in layers:
        assert layer.weight is None
        assert layer.codes[...].dtype == jnp.int8
        assert layer.weight_scale[...].dtype == jnp.float32  # also where the rest computes in bfloat16
        # Its bias may be wider in the float model (`keep_float32`), but never narrower.
        extra = leaf_bytes(layer.weight_scale) + leaf_bytes(layer.weight_sqnr_db)
        saved += layer.codes[...].size * (width - 1) - extra
    assert held_bytes(plain) - held_bytes(quantized) == pytest.approx(saved, abs=0)
    # Half of float32 and more: these layers hold most weights even of so narrow a model.
    assert held_bytes(quantized) < (0.5 if dtype == "float32" else 0.8) * held_bytes(plain)


def test_it_predicts_what_the_quantized_model_does():
    model, inputs = small_models.wan(num_layers=1), small_models.wan_inputs()
    call = jax.jit(lambda model: model(**inputs))
    for name in ("rtn-w8a8", "rtn-w4a16"):
        wanted = call(qvdjax.quantize(model, name))
        np.testing.assert_array_equal(call(frozen(model, teacher_recipe(name), "float32")), wanted)
        narrow = call(frozen(model, teacher_recipe(name), "bfloat16"))
        assert narrow.dtype == jnp.bfloat16
        # A few roundings to 8 bits of mantissa, of values that the model's own prediction is as large as.
        assert float(jnp.abs(narrow - wanted).max()) < 0.1 * float(jnp.abs(wanted).max())


def test_codes_are_spread_as_weights_are():
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    teacher = frozen(place(small_models.wan(), mesh), teacher_recipe("rtn-w8a8"), "float32", mesh)
    wanted = jax.tree.leaves(shardings(teacher, mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(teacher)] == wanted
    codes = teacher.stacks[0].block.ffn.net["0"].proj.codes[...]
    assert codes.addressable_shards[0].data.size == codes.size // 4


@pytest.mark.parametrize(
    ("name", "words"),
    [("minmax-w8a8", "needs calibration"), ("smoothquant-w8a8", "needs calibration"), ("qvgen-w4a4", "are trained"),
     ("rtn", "unknown recipe")],
)  # fmt: skip
def test_recipes_that_need_more_than_weights_make_no_teacher(name, words):
    with pytest.raises(UserError, match=words):
        teacher_recipe(name)


def test_what_a_teacher_predicted_counts_as_much_as_the_teacher():
    model, data = small_models.wan(), small_models.wan_inputs()
    student = small_models.wan(seed=1)
    batch = {"latents": data["latents"], "context": data["context"]}
    for fading in (None, 5.0):
        settings = Settings(batch=2, objective=Objective(data=1.0, teacher=1.0, fading=fading))

        @jax.jit
        def losses(settings=settings):
            known = prediction_of(model, batch, jnp.int32(3), settings)
            corrupted = settings.corrupted({**batch, "teacher": known}, jnp.int32(3))
            live = settings.corrupted(batch, jnp.int32(3))
            loss = settings.objective.loss
            return loss(student, corrupted), loss(student, live, model), loss(student, live)

        cached, live, alone = losses()
        assert float(cached) == pytest.approx(float(live), rel=1e-6)  # one sum in float32, perhaps fused otherwise
        assert float(alone) != pytest.approx(float(live), rel=0.01)


def test_predictions_come_in_the_batchs_order(data_folder, model_folder):
    model, batch = models.load(model_folder), stream(data_folder, seed=0, size=4)[0]
    whole = predictor(model, SETTINGS)(5, batch)
    for settings, mesh in (
        (dataclasses.replace(SETTINGS, accumulate=2), None),
        (SETTINGS, make_mesh({"data": 2, "fsdp": 2})),
        (dataclasses.replace(SETTINGS, accumulate=2), make_mesh({"data": 2})),
    ):
        placed = model if mesh is None else place(model, mesh)
        # Products of other shapes: float32 sums over at most 48 terms through two blocks.
        np.testing.assert_allclose(predictor(placed, settings, mesh)(5, batch), whole, atol=1e-5)
    assert np.abs(whole - predictor(model, SETTINGS)(6, batch)).max() > 0.1  # another step, other noise


def teaching(source, data, folder, *, recipe=None, steps=2, tell=None, **changes):
    settings, examples = dataclasses.replace(SETTINGS, **changes), DataFolder(data)
    return teaching_of(
        source, models.skeleton(source), recipe, folder, settings, {"examples": len(examples), **examples.shapes},
        stream(data, seed=settings.seed, size=settings.batch), steps, tell=tell,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(model_folder, data_folder, tmp_path_factory):
    """Two steps of four examples."""
    path = tmp_path_factory.mktemp("cache") / "predictions"
    teaching(model_folder, data_folder, path).start(
        models.load(model_folder), stream(data_folder, seed=0, size=4)
    )  # fmt: skip
    return path


def test_the_cost_is_told_before_anything_is_written(model_folder, data_folder, cache, tmp_path):
    said = []
    teaching(model_folder, data_folder, tmp_path / "new", tell=said.append)
    # 2 steps x 4 examples x 2 frames x 4 x 4 x 12 channels x 4 bytes.
    assert said == [f"12 KiB of the teacher's predictions will be written to {tmp_path / 'new'}"]
    teaching(model_folder, data_folder, tmp_path / "new", tell=said.append, dtype="bfloat16")
    assert said[1].startswith("6 KiB ")
    assert not (tmp_path / "new").exists()
    teaching(model_folder, data_folder, cache, tell=said.append)
    assert len(said) == 2  # all is there


def test_a_cache_serves_runs_that_differ_in_the_student_alone(model_folder, data_folder, cache):
    taught = teaching(
        model_folder, data_folder, cache, learning_rate=0.1, warm_up=3, average=None, accumulate=2, remat=True,
        objective=dataclasses.replace(SETTINGS.objective, data=0.5, fading=3.0), steps=1,
    )  # fmt: skip
    model, batches = taught.start(None, stream(data_folder, seed=0, size=4))  # no model is needed to teach
    assert model is None
    assert batches[1]["teacher"].shape == (4, 2, 4, 4, 12)


def test_a_cache_of_another_run_is_refused(model_folder, data_folder, cache, write_latents, tmp_path):
    def item(**changes):
        with pytest.raises(UserError, match="this run cannot use") as refusal:
            teaching(**{"source": model_folder, "data": data_folder, "folder": cache, **changes})
        return " ".join(refusal.value.items)

    assert "seed: 0 there, 1 here" in item(seed=1)
    assert "batch: 4 there, 2 here" in item(batch=2)
    assert "dtype: float32 there, bfloat16 here" in item(dtype="bfloat16")
    assert "teacher: None there, rtn-w8a8 here" in item(recipe=teacher_recipe("rtn-w8a8"))
    assert "drop_caption" in item(objective=dataclasses.replace(SETTINGS.objective, drop_caption=0.0))
    assert "examples: 6 there, 5 here" in item(data=write_latents(tmp_path / "five", count=5))
    other = shutil.copytree(model_folder, tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    tensors["blocks.1.ffn.net.2.weight"] *= np.float32(1.001)
    save_file(tensors, other / WEIGHTS)
    assert item(source=other).startswith("made_by.weights: ")
    same_size = shutil.copytree(data_folder, tmp_path / "changed")
    examples = load_file(same_size / "data-00000.safetensors")
    save_file({name: value + np.float32(0.1) for name, value in examples.items()}, same_size / "data-00000.safetensors")
    with pytest.raises(UserError, match="other data"):
        teaching(model_folder, same_size, cache)


def test_another_generator_of_noise_is_another_run(model_folder, data_folder, cache):
    with jax.threefry_partitionable(False), pytest.raises(UserError, match="noise"):
        teaching(model_folder, data_folder, cache)


def test_the_fingerprint_does_not_depend_on_shards(model_folder, tmp_path):
    whole = CheckpointFolder.open(model_folder)
    tensors = load_file(model_folder / WEIGHTS)
    models_own = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"part-{number}.safetensors"
        (tmp_path / "parts").mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in part}, tmp_path / "parts" / file)
        models_own["weight_map"] |= dict.fromkeys(part, file)
    (tmp_path / "parts" / f"{WEIGHTS}.index.json").write_text(json.dumps(models_own))
    shutil.copy(model_folder / "config.json", tmp_path / "parts")
    assert fingerprint(CheckpointFolder.open(tmp_path / "parts")) == fingerprint(whole)


RUN = {"steps": 4, "batch": 4, "learning_rate": 5e-4, "warm_up": 1}


@pytest.fixture(scope="module")
def runs(model_folder, data_folder, tmp_path_factory):
    """runs(name, **options) trains four steps, once a name: the report, the weights and the bytes on the device."""
    made, folder = {}, tmp_path_factory.mktemp("runs")

    def run(name, **options):
        if name not in made:
            held = {}

            def watch(stage, done, total):
                if stage == "training":
                    gc.collect()
                    held["bytes"] = sum(array.nbytes for array in jax.live_arrays())

            gc.collect()
            before = sum(array.nbytes for array in jax.live_arrays())
            report = train_folder(
                model_folder, folder / name, options.pop("recipe", "rtn-w4a4"), data_folder, progress=watch,
                **{**RUN, **options},
            )  # fmt: skip
            weights = (folder / name / WEIGHTS).read_bytes()
            made[name] = {"report": report, "weights": weights, "bytes": held["bytes"] - before}
        return made[name]

    run.folder = folder
    return run


@pytest.mark.slow
def test_a_teacher_of_codes_teaches_nearly_the_same_in_less_memory(runs):
    plain, quantized = runs("plain"), runs("codes", teacher="rtn-w8a16")
    losses = [run["report"]["last_loss"] for run in (plain, quantized)]
    # The teacher's own rounding of 8 bits is far below the student's of 4.
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert losses[1] != losses[0]
    teachers = [run["report"]["teacher_bytes"] for run in (plain, quantized)]
    assert teachers[1] < 0.75 * teachers[0]  # half of so small a model stays float
    assert plain["bytes"] - quantized["bytes"] == teachers[0] - teachers[1]  # all that is held, not the teacher alone


@pytest.mark.slow
def test_a_cached_teacher_teaches_the_same_bits_from_disk(runs):
    plain, cached = runs("plain"), runs("cached", teacher_cache=runs.folder / "predictions")
    assert cached["report"]["teacher_bytes"] == 0
    assert plain["bytes"] - cached["bytes"] == plain["report"]["teacher_bytes"]
    assert cached["report"]["last_loss"] == plain["report"]["last_loss"]
    assert cached["weights"] == plain["weights"]


@pytest.mark.slow
def test_other_students_take_the_same_predictions(runs, monkeypatch):
    folder = runs.folder / "predictions"
    runs("cached", teacher_cache=folder)

    def refuse(*arguments):
        raise AssertionError("a teacher was made")

    monkeypatch.setattr("experiments.training.teaching.predictor", refuse)
    other = runs(
        "other", recipe="q-dm-w4a4", teacher_cache=folder, learning_rate=1e-3, steps=3, data_weight=0.5, accumulate=2
    )  # fmt: skip
    assert np.isfinite(other["report"]["last_loss"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16", "remat": True}, {"accumulate": 2}, {"teacher": "rtn-w8a8"}, {"recipe": "dsaquant-w4a4"}],
    ids=lambda options: next(iter(options)),
)
def test_the_same_bits_under_other_options(runs, tmp_path, options):
    live = runs(f"live {options}", **options)
    cached = runs(f"cached {options}", teacher_cache=tmp_path / "predictions", **options)
    assert cached["report"]["last_loss"] == live["report"]["last_loss"]
    assert cached["weights"] == live["weights"]


@pytest.mark.slow
def test_on_a_mesh(runs, tmp_path):
    plain, mesh = runs("plain"), "data=2,fsdp=2"
    for name, options in (
        ("cached", {"teacher_cache": tmp_path / "predictions"}),
        ("codes", {"teacher": "rtn-w8a8"}),
        ("both", {"teacher": "rtn-w8a8", "teacher_cache": tmp_path / "codes"}),
    ):
        loss = runs(f"{name} on a mesh", mesh=mesh, **options)["report"]["last_loss"]
        # Sums in another order, four steps of Adam; codes of 8 bits as above.
        assert loss == pytest.approx(plain["report"]["last_loss"], rel=1e-3 if name == "cached" else 0.2)


def test_states_belong_to_one_teacher(model_folder, data_folder, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", stop)  # after everything was checked
    argv = ["train", model_folder, tmp_path / "out", "-r", "rtn-w4a4", "--data", data_folder, "--resume",
            "--checkpoints", tmp_path / "states"]  # fmt: skip
    argv = [str(word) for word in argv]
    assert main([*argv, "--teacher", "rtn-w8a16"]) == 130
    (tmp_path / "states" / "500").mkdir()  # a state, for all that is known before a weight is read
    assert main([*argv, "--teacher", "rtn-w8a16"]) == 130
    capsys.readouterr()
    assert main([*argv, "--teacher", "rtn-w8a8"]) == 2
    assert "teacher: rtn-w8a16 there, rtn-w8a8 here" in capsys.readouterr().err
    assert main(argv) == 2
    assert "teacher: rtn-w8a16 there, None here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("teaching", ["codes", "cached"])
def test_an_interrupted_run_goes_on_to_the_same_bits(runs, model_folder, data_folder, tmp_path, teaching):
    def interrupt(stage, done, total):
        if (stage, done) == ("training", total):
            raise KeyboardInterrupt

    taught = {"teacher": "rtn-w8a16"} if teaching == "codes" else {"teacher_cache": runs.folder / "predictions"}
    whole, options = runs(teaching, **taught), {"checkpoints": tmp_path / "states", "save_every": 3, **RUN, **taught}
    with pytest.raises(KeyboardInterrupt):
        train_folder(model_folder, tmp_path / "out", "rtn-w4a4", data_folder, progress=interrupt, **options)
    report = train_folder(model_folder, tmp_path / "out", "rtn-w4a4", data_folder, resume=True, **options)
    assert (report["first_step"], report["teacher_bytes"]) == (3, whole["report"]["teacher_bytes"])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == whole["weights"]


@pytest.mark.slow
def test_the_program_makes_and_uses_a_cache(model_folder, data_folder, tmp_path, capsys):
    argv = ["train", model_folder, tmp_path / "out", "-r", "rtn-w4a4", "--data", data_folder, "--steps", 2,
            "--batch", 2, "--teacher-cache", tmp_path / "predictions", "--json", "--overwrite"]  # fmt: skip
    argv = [str(word) for word in argv]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["teacher_bytes"] == 0
    # 2 steps x 2 examples x 2 frames x 4 x 4 x 12 channels x 4 bytes.
    assert err == f"qvdjax: 6 KiB of the teacher's predictions will be written to {tmp_path / 'predictions'}\n"
    (tmp_path / "predictions" / "predictions-00000000.safetensors").write_bytes(b"")
    assert main(argv) == 2
    assert "makes it anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--teacher", "minmax-w8a8"], ["minmax-w8a8 needs calibration", "rtn-w8a16"]),
        (["--teacher", "qvgen-w4a4"], ["qvgen-w4a4 are trained", "rtn-w8a16"]),
        (["--teacher", "int8"], ["unknown recipe 'int8'"]),
        (["--recipe", "lsq-w4a4", "--teacher", "rtn-w8a8"], ["no teacher", "leave out --teacher"]),
        (["--recipe", "lsq-w4a4", "--teacher-cache", "new"], ["no teacher", "leave out --teacher-cache"]),
    ],
)
def test_teachers_that_make_no_sense_are_refused(
    model_folder, data_folder, tmp_path, monkeypatch, capsys, options, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *args, **more: pytest.fail("weights were read"))
    recipe = [] if "--recipe" in options else ["--recipe", "rtn-w4a4"]
    argv = ["train", model_folder, tmp_path / "out", "--data", data_folder, *recipe, *options]
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []
