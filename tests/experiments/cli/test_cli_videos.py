"""calibrate, sample and evaluate on a small untrained model: what is written, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from qvdjax.calibration import CalibrationSet

RED, BLUE = "a red disc moving left", "a blue ring moving up"


@pytest.fixture(scope="module")
def calibration(model_folder, tmp_path_factory):
    from experiments.calibrating import calibrate_folder

    target = tmp_path_factory.mktemp("calibration") / "set"
    calibrate_folder(model_folder, target, prompts=[RED, BLUE])
    return target


def refused(done, *names):
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    for name in names:
        assert str(name) in done.err
    return True


def test_sample_writes_the_video_and_its_record(qvdjax, model_folder, tmp_path):
    done = qvdjax("sample", model_folder, "-o", tmp_path / "clip.mp4", "-p", RED, "--seeds", "7", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.report["files"] == [str(tmp_path / "clip.mp4")]
    assert (done.report["steps"], done.report["guidance_scale"]) == (2, 4.0)
    assert done.report["compile_seconds"] > 0
    record = json.loads((tmp_path / "clip.json").read_text())
    assert (record["prompt"], record["seed"]) == (RED, 7)
    assert sorted(os.listdir(tmp_path)) == ["clip.json", "clip.mp4"]


def test_a_seed_is_the_same_video_alone_and_among_others(qvdjax, model_folder, tmp_path):
    common = ["--steps", "3", "--guidance-scale", "2", "-p", RED, "-p", BLUE]
    many = qvdjax("sample", model_folder, "-o", tmp_path / "many.safetensors", *common, "--seeds", "0-2", "--json")
    assert len(many.report["files"]) == 6
    one = ["-p", BLUE, "--seeds", "1", "--steps", "3", "--guidance-scale", "2"]
    assert qvdjax("sample", model_folder, "-o", tmp_path / "one.safetensors", *one).code == 0
    among = next(v["file"] for v in many.report["videos"] if (v["prompt"], v["seed"]) == (BLUE, 1))
    first, second = (load_file(path)["latents"] for path in (among, tmp_path / "one.safetensors"))
    # Other batch, other order of float32 sums: rounding only, on latents of size 1.
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_options_reach_the_sampler(qvdjax, model_folder, tmp_path):
    options = ["--solver", "euler", "--shift", "2", "--frames", "2", "--height", "6", "--step-loop"]
    done = qvdjax("sample", model_folder, "-o", tmp_path / "x.safetensors", *options, "--json")
    assert done.code == 0, done.err
    assert (done.report["solver"], done.report["shift"], done.report["loop"]) == ("euler", 2.0, "steps")
    assert load_file(tmp_path / "x.safetensors")["latents"].shape[-4:] == (2, 6, 4, 12)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["-p", "a purple disc moving left"], ["purple", "red"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--height", "5"], ["5", "patch"]),
        (["--mesh", "data=64"], ["64"]),
        (["--mesh", "rows=2"], ["rows"]),
        (["--seeds", "x"], ["--seeds"]),
        (["--prompts", "/no/where.txt"], ["/no/where.txt"]),
        (["--context", "/no/where.safetensors"], ["context"]),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "calibrate"])
def test_what_sampling_refuses(qvdjax, model_folder, tmp_path, verb, options, names):
    target = ["-o", tmp_path / "clip.mp4"] if verb == "sample" else [tmp_path / "set"]
    assert refused(qvdjax(verb, model_folder, *target, *options), *names)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["clip.avi", "no/such/folder/clip.mp4", "taken.mp4"])
def test_outputs_that_cannot_be(qvdjax, model_folder, tmp_path, name):
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "no").write_text("a file where a folder should be")
    assert refused(qvdjax("sample", model_folder, "-o", tmp_path / name), name.split("/clip")[0])
    assert sorted(os.listdir(tmp_path)) == ["no", "taken.mp4"]


def test_calibrate_records_what_the_model_was_given(qvdjax, model_folder, tmp_path):
    done = qvdjax("calibrate", model_folder, tmp_path / "set", "--count", "3", "--steps", "4", "--json")
    assert done.code == 0, done.err
    assert (done.report["samples"], done.report["steps"], done.report["model_inputs"]) == (3, 4, 24)
    made = CalibrationSet.open(tmp_path / "set")
    assert len(made) == 3
    seeds = [sample["seed"] for sample in made.manifest["samples"]]
    assert seeds == [1000, 1001, 1002]
    assert made.trajectory(0).latents.shape == (4, 3, 4, 4, 12)
    # The first input is noise, and the model is told times that fall from 1000.
    assert 0.8 < made.trajectory(0).latents[0].std() < 1.2
    assert made.trajectory(0).timestep[0] > made.trajectory(0).timestep[-1] > 0


def test_calibrate_goes_on_where_it_stopped(qvdjax, model_folder, tmp_path):
    command = ["calibrate", model_folder, tmp_path / "set", "-p", RED, "-p", BLUE]
    assert qvdjax(*command).code == 0
    kept, lost = tmp_path / "set" / "sample-0000.safetensors", tmp_path / "set" / "sample-0001.safetensors"
    before, first = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert qvdjax(*command).code == 0
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == first
    assert refused(qvdjax(*command, "--steps", "5"), "set")


def test_calibrate_without_guidance_sees_one_branch(qvdjax, model_folder, tmp_path):
    options = ["-p", RED, "--guidance-scale", "1", "--json"]
    done = qvdjax("calibrate", model_folder, tmp_path / "set", *options)
    assert done.report["model_inputs"] == 2
    sample = CalibrationSet.open(tmp_path / "set").trajectory(0)
    np.testing.assert_array_equal(sample.context, sample.negative_context)


def test_calibrate_on_a_mesh_records_the_same(qvdjax, model_folder, calibration, tmp_path):
    options = ["-p", RED, "-p", BLUE, "--mesh", "fsdp=2,tensor=2"]
    assert qvdjax("calibrate", model_folder, tmp_path / "set", *options).code == 0
    for number in range(2):
        alone = CalibrationSet.open(calibration).trajectory(number).latents
        spread = CalibrationSet.open(tmp_path / "set").trajectory(number).latents
        # Two steps of a model of two blocks; sums over four devices round differently in float32.
        np.testing.assert_allclose(spread, alone, atol=1e-5)


@pytest.mark.parametrize("recipe", ["smoothquant-w4a4", "minmax-w8a8"])
def test_quantize_with_a_calibration(qvdjax, model_folder, calibration, tmp_path, recipe):
    done = qvdjax("quantize", model_folder, tmp_path / "q", "-r", recipe, "--calibration", calibration, "--json")
    assert done.code == 0, done.err
    assert (done.report["recipe"], done.report["calibration"]) == (recipe, str(calibration))
    assert qvdjax("sample", tmp_path / "q", "-o", tmp_path / "q.mp4").code == 0


def test_quantize_makes_its_own_calibration(qvdjax, model_folder, tmp_path):
    done = qvdjax("quantize", model_folder, tmp_path / "q", "-r", "smoothquant-w4a4", "--json")
    assert (done.code, done.report["calibration"]) == (0, None)
    assert os.listdir(tmp_path) == ["q"]


def test_a_calibration_of_another_model_is_refused(qvdjax, model_folder, calibration, tmp_path):
    other = tmp_path / "set"
    other.mkdir()
    for path in calibration.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["config"]["num_layers"] = 7
    (other / "manifest.json").write_text(json.dumps(manifest))
    command = ["quantize", model_folder, tmp_path / "q", "-r", "minmax-w8a8", "--calibration", other]
    assert refused(qvdjax(*command), other, "another architecture")
    (other / "manifest.json").write_text("{}")
    assert refused(qvdjax(*command), other)
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize(("change", "named"), [
    ({"solver": "euler"}, "solver euler for unipc"),
    ({"shift": 5.0}, "shift 5.0 for 3.0"),
    ({"latents": [5, 4, 4, 12]}, "frames 5 for 3"),
])  # fmt: skip
def test_a_calibration_that_was_sampled_otherwise_is_refused(
    qvdjax, model_folder, calibration, tmp_path, change, named
):
    other = tmp_path / "set"
    shutil.copytree(calibration, other)
    manifest = json.loads((other / "manifest.json").read_text())
    assert set(change) <= set(manifest)
    (other / "manifest.json").write_text(json.dumps({**manifest, **change}))
    command = ["quantize", model_folder, tmp_path / "q", "-r", "minmax-w8a8", "--calibration", other]
    assert refused(qvdjax(*command), other, named, "--other-sampler")
    assert os.listdir(tmp_path) == ["set"]
    if "shift" in change:  # another number of steps, or guidance, is no other sampler
        (other / "manifest.json").write_text(json.dumps({**manifest, "steps": 7, "guidance_scale": 1.0}))
        assert qvdjax(*command).code == 0
        (other / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert qvdjax(*command, "--overwrite", "--other-sampler").code == 0


def test_evaluate_a_model_against_itself_and_thresholds(qvdjax, model_folder, tmp_path):
    command = ["evaluate", model_folder, model_folder, "-o", tmp_path / "report", "-p", RED, "-p", BLUE]
    done = qvdjax(*command, "--max-teacher-forced-error", "0", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.report["teacher_forced_error"]["mean"] == 0
    written = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert written["teacher_forced_error"]["mean"] == 0
    assert "<html" in (tmp_path / "report" / "report.html").read_text()


def test_evaluate_takes_the_options_of_sample(qvdjax, model_folder, tmp_path):
    options = ["--solver", "euler", "--shift", "2", "--guidance-until", "400", "--frames", "2", "--steps", "3"]
    done = qvdjax("evaluate", model_folder, model_folder, "-o", tmp_path / "report", "-p", RED, *options, "--json")
    assert (done.code, done.err) == (0, "")
    sampling = done.report["sampling"]
    assert sampling["solver"] == {"name": "euler", "shift": 2.0}
    assert (sampling["guidance_until"], sampling["steps"], sampling["latents"][0]) == (400, 3, 2)


def test_a_missed_threshold_is_exit_code_1(qvdjax, model_folder, tmp_path):
    assert qvdjax("quantize", model_folder, tmp_path / "q", "-r", "rtn-w3a3").code == 0
    command = ["evaluate", model_folder, tmp_path / "q", "-o", tmp_path / "report", "-p", RED, "-p", BLUE]
    done = qvdjax(*command, "--max-teacher-forced-error", "1e-9", "--min-ssim", "-1")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "max_teacher_forced_error" in done.err
    assert "report.html" in done.out  # the report is written all the same
    assert (tmp_path / "report" / "metrics.json").exists()


def test_evaluate_refuses_what_cannot_be_compared(qvdjax, model_folder, tmp_path):
    command = ["evaluate", model_folder, model_folder, "-o", tmp_path / "report"]
    assert refused(qvdjax(*command, "-p", "a purple disc"), "purple")
    assert refused(qvdjax(*command, "--count", "0"), "0")
    assert not os.listdir(tmp_path)
