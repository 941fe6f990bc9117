"""vbench: result files as VBench's program writes them, and videos under the names that it looks for."""

import json
from types import SimpleNamespace

import pytest

from experiments.cli.main import main
from experiments.sampling.output import output_paths
from experiments.vbench import score_results
from qvdjax.errors import UserError
from qvdjax.metrics.vbench import DIMENSIONS


def written(path, scores):
    """A file of VBench's: each dimension's score and the videos it was taken from."""
    videos = [{"video_path": "a-0.mp4", "video_results": 0.5}] * 3
    path.write_text(json.dumps({name: [score, videos] for name, score in scores.items()}))
    return path


def test_several_files_make_one_total(tmp_path, capsys):
    half = len(DIMENSIONS) // 2
    names = list(DIMENSIONS)
    written(tmp_path / "a_eval_results.json", dict.fromkeys(names[:half], 0.5))
    written(tmp_path / "b_eval_results.json", dict.fromkeys(names[half:], 0.25))
    written(tmp_path / "a_full_info.json", {})
    report = score_results([tmp_path])
    assert len(report["files"]) == 2
    assert report["missing"] == []
    assert report["videos"]["scene"] == 3
    assert report["total"] == pytest.approx((4 * report["quality"] + report["semantic"]) / 5)
    assert main(["vbench", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "total" in out
    assert "subject_consistency" in out


def test_what_is_missing_is_said(tmp_path, capsys):
    file = written(tmp_path / "a_eval_results.json", {"scene": 0.4, "color": 0.8})
    assert main(["vbench", str(file)]) == 0
    out = capsys.readouterr().out
    assert "no total: 14 of 16 dimensions are missing: subject_consistency, background_consistency" in out
    assert main(["vbench", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] is None


@pytest.mark.parametrize(("content", "message"), [
    ({"scene": 0.5}, "'scene' is no dimension of VBench with its score"),
    ({"beauty": [0.5, []]}, "'beauty' is no dimension"),
    ({"scene": [None, []]}, "the score of 'scene' is None"),
])  # fmt: skip
def test_other_files_are_said(tmp_path, content, message):
    (tmp_path / "a_eval_results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        score_results([tmp_path / "a_eval_results.json"])


def test_videos_have_the_names_that_vbench_looks_for(tmp_path):
    request = SimpleNamespace(prompts=("A cat, asleep.", "A cat, asleep.", "a dog"), seeds=(3, 5, 3), names=())
    paths = output_paths(tmp_path / "any.mp4", request, "vbench")
    assert [path.name for path in paths] == ["A cat, asleep.-0.mp4", "A cat, asleep.-1.mp4", "a dog-0.mp4"]
    assert {path.parent for path in paths} == {tmp_path}
    for prompt in ("a/b", "", "x" * 250, None):
        with pytest.raises(UserError, match="cannot be names of files"):
            output_paths(tmp_path / "any.mp4", SimpleNamespace(prompts=(prompt,), seeds=(0,), names=()), "vbench")


def test_no_file_and_the_same_twice_are_said(tmp_path):
    with pytest.raises(UserError, match="no result of VBench is named"):
        score_results([tmp_path])
    for name in "ab":
        written(tmp_path / f"{name}_eval_results.json", {"scene": 0.5})
    with pytest.raises(UserError, match="both have scene; name one of them"):
        score_results([tmp_path])
