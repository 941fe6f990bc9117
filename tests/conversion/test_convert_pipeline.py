"""Whole pipelines converted: every component, what is in the way, and the check of what was written."""

import json
import os
import shutil

import numpy as np
import pytest
from published_folders import WAN_VAE, published_pipeline
from safetensors.numpy import load_file, save_file

import conversion
import models
from conversion import written
from models.encoders import EncoderFolder, load_encoder
from models.pipeline_folder import PipelineFolder
from models.prompts import PromptEncoder
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.errors import UserError

SCHEDULER = '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 9.0}'


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = published_pipeline(tmp_path_factory.mktemp("published") / "wan", "wan", WAN_VAE)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(SCHEDULER)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "LICENSE.txt").write_text("terms")
    return folder


@pytest.fixture
def changed(published, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(published, tmp_path / "published")


def weights(folder, name):
    opened = (EncoderFolder if name == "text_encoder" else CheckpointFolder).open(folder / name)
    return {key: opened.read(key) for key in opened.keys}


COMPONENTS = ("text_encoder", "transformer", "vae")


def test_every_component_comes_out_as_it_went_in(published, tmp_path):
    told = []
    target = tmp_path / "target"
    report = conversion.convert(published, target, progress=lambda *state: told.append(state))
    before, after = ({str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()} for root in (published, target))
    assert before == after
    for name in COMPONENTS:
        ours, theirs = weights(target, name), weights(published, name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
        size = sum(value.nbytes for value in theirs.values())
        assert [state for state in told if state[0].startswith(name)][-1] == (f"{name}: checking", size, size)
    for name in ("model_index.json", "LICENSE.txt", "tokenizer/spiece.model", "scheduler/scheduler_config.json"):
        assert (target / name).read_bytes() == (published / name).read_bytes()
    by_name = {part["name"]: part for part in report["components"]}
    assert {name: part["action"] for name, part in by_name.items()} == {
        **dict.fromkeys(COMPONENTS, "convert"), "tokenizer": "copy", "scheduler": "copy",
    }  # fmt: skip
    assert by_name["vae"]["tensors"] == len(weights(published, "vae"))
    assert report["bytes"] == report["source_bytes"] == sum(part["bytes"] for part in by_name.values())
    assert report["problems"] == {}
    json.dumps(report)
    PromptEncoder.open(PipelineFolder.open(target))


def test_a_wanted_type_goes_to_every_component(changed, tmp_path):
    config = json.loads((changed / "text_encoder" / "config.json").read_text())
    (changed / "text_encoder" / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    conversion.convert(changed, tmp_path / "target", dtype="bfloat16")
    folder = tmp_path / "target"
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, load in (("text_encoder", load_encoder), ("transformer", models.load), ("vae", models.load_vae)):
        narrow, wide = weights(folder, name), weights(changed, name)
        kinds = {str(value.dtype) for value in narrow.values()}
        assert "bfloat16" in kinds <= {"bfloat16", "float32"}
        for key, value in narrow.items():
            assert value.tobytes() == wide[key].astype(value.dtype).tobytes()
        load(folder / name)


def test_one_component_alone_is_a_model_folder(published, tmp_path):
    report = conversion.convert(published, tmp_path / "target", component="transformer")
    assert report["family"] == "wan"
    models.load(tmp_path / "target")
    with pytest.raises(UserError, match="names no unet; it names transformer"):
        conversion.convert(published, tmp_path / "other", component="unet")


def test_a_dry_run_says_all_that_is_missing_and_writes_nothing(changed, tmp_path):
    shutil.rmtree(changed / "vae")
    (changed / "tokenizer" / "spiece.model").unlink()
    (changed / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    before = sorted(os.listdir(tmp_path))
    report = conversion.convert(changed, tmp_path / "target", dry_run=True)
    assert sorted(os.listdir(tmp_path)) == before
    assert {part["name"] for part in report["components"]} == {"text_encoder", "scheduler"}
    assert report["target"] is None
    assert report["problems"].keys() == {"vae", "tokenizer", "transformer"}
    assert "lacks the folder vae, of its AutoencoderKLWan; download it too" in report["problems"]["vae"]
    assert "holds no tokenizer; download tokenizer.json" in report["problems"]["tokenizer"]
    with pytest.raises(UserError, match="cannot be converted whole") as error:
        conversion.convert(changed, tmp_path / "target")
    assert len(error.value.items) == 3
    assert sorted(os.listdir(tmp_path)) == before


def test_a_dry_run_says_what_would_be_written(published, tmp_path):
    dry = conversion.convert(published, tmp_path / "target", dtype="bfloat16", dry_run=True)
    assert not (tmp_path / "target").exists()
    real = conversion.convert(published, tmp_path / "target", dtype="bfloat16")
    same = ("components", "problems", "source_bytes", "bytes")
    assert {name: dry[name] for name in same} == {name: real[name] for name in same}
    sizes = {name: sum(v.nbytes for v in weights(tmp_path / "target", name).values()) for name in COMPONENTS}
    assert {part["name"]: part["bytes"] for part in dry["components"] if part["name"] in sizes} == sizes


def strange_key(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "stranger": np.zeros(2, np.float32)}, file)


def infinite(folder):
    file = folder / "text_encoder" / "model.safetensors"
    values = load_file(file)
    values["shared.weight"][3] = np.inf
    save_file(values, file)


def other_component(library, kind, **files):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        index["safety_checker"] = [library, kind]
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "safety_checker").mkdir()
        for name, content in files.items():
            (folder / "safety_checker" / name.replace("_", ".")).write_bytes(content)

    return change


@pytest.mark.parametrize(("change", "message"), [
    (strange_key, "stranger (unknown)"),
    (infinite, "text_encoder holds NaN or infinite weights"),
    (other_component("stable_diffusion", "Checker", model_safetensors=b"x"), "weights of Checker, which is not known"),
    (other_component("stable_diffusion", "Checker", model_bin=b"x"), "holds PyTorch pickles"),
    (other_component("stable_diffusion", "Checker"), "safety_checker is empty; download the files of its Checker"),
])  # fmt: skip
def test_what_cannot_be_converted_is_said_and_leaves_nothing(changed, tmp_path, change, message):
    change(changed)
    with pytest.raises(UserError) as error:
        conversion.convert(changed, tmp_path / "target")
    assert message in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["published"]


def test_what_does_not_read_back_is_said_and_leaves_nothing(published, tmp_path, monkeypatch):
    """As on a disk that loses what it was given."""
    real = CheckpointFolder.read

    def read(self, key, index=()):
        values = real(self, key, index)
        return values + 1 if ".partial-" in str(self.path) and key == "proj_out.bias" else values

    monkeypatch.setattr(written.CheckpointFolder, "read", read)
    for options in ({}, {"component": "transformer"}):
        with pytest.raises(UserError, match="read back is not what was written") as error:
            conversion.convert(published, tmp_path / "target", **options)
        assert error.value.items == ("proj_out.bias",)
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(published, tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.pipeline._free_bytes", lambda target: 1000)
    with pytest.raises(UserError, match="its disk has 0.0 left; free some space"):
        conversion.convert(published, tmp_path / "target")
    assert not list(tmp_path.iterdir())
