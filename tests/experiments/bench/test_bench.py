import json
import math

import jax
import jax.numpy as jnp
import pytest

from experiments import bench
from experiments.bench import bench as bench_module
from experiments.bench import cases as cases_module
from experiments.bench import rivals
from experiments.bench.cases import logical_bytes
from experiments.bench.peaks import _command
from experiments.bench.shapes import LATENT_SIZES, SHAPES, Shape
from qvdjax.errors import UserError
from qvdjax.nn import Codes, Param

SMALL = Shape(
    "small",
    {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 32,
        "ffn_dim": 96, "num_layers": 2, "text_dim": 16, "freq_dim": 32,
    },
    (3, 4, 6, 16),
    5,
)  # fmt: skip

CONTRACT = {"name", "shape", "device", "median_ms", "spread_ms", "reference_median_ms", "ratio", "ceiling"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "results" / "small.json"
    stages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "small", SMALL)
        got = bench.run_bench(
            shapes=("small",), recipes=("rtn-w8a8",), repeats=2, output=output,
            progress=lambda *stage: stages.append(stage),
        )  # fmt: skip
    assert json.loads(output.read_text()) == got
    assert stages[-1] == ("done", 4, 4)
    return got


def test_every_case_is_timed_and_none_fails(report):
    assert report["failed"] == report["left_out"] == []
    assert [row["name"] for row in report["results"]] == [
        "linear/rtn-w8a8", "attention/int8-qk", "attention/int8-qk-pv", "attention/float8-qk-pv", "block/rtn-w8a8",
        "step/rtn-w8a8",
    ]  # fmt: skip


def test_rows_hold_what_the_contract_names_and_ratios_are_reference_over_measured(report):
    for row in report["results"]:
        assert row.keys() >= CONTRACT
        assert row["ratio"] == row["reference_median_ms"] / row["median_ms"]
        assert row["median_ms"] > 0
        assert row["spread_ms"] >= 0
    assert report["versions"]["jax"] == jax.__version__


def test_outputs_are_those_of_quantized_layers(report):
    errors = {row["name"]: row["relative_error"] for row in report["results"]}
    # Eight bits over a range of about four standard deviations give a relative error near 0.9 %; products of
    # two such factors, and sums of two such errors in a block and a model, stay within a factor of ten.
    assert all(1e-3 < error < 9e-2 for error in errors.values())
    references = {row["name"]: row["reference_relative_error"] for row in report["results"]}
    assert all(error < 1e-5 for error in references.values())  # float32 against float32


def test_weights_take_their_logical_bytes(report):
    rows = {row["name"]: row for row in report["results"]}
    width, hidden = SMALL.width, SMALL.hidden
    assert rows["linear/rtn-w8a8"]["reference_weight_bytes"] == 4 * (width * hidden + hidden)
    linear = rows["linear/rtn-w8a8"]
    statistic = 4  # the recorded signal-to-noise ratio
    assert linear["weight_bytes"] - statistic == width * hidden + 4 * hidden + 4 * hidden  # codes, scales, bias


def test_four_bit_codes_count_half_a_byte():
    class Holder(cases_module.nnx.Module):
        def __init__(self):
            self.codes = Codes(jnp.zeros((4, 6), jnp.int4), axes=(None, None), bits=4)
            self.bias = Param(jnp.zeros((4,), jnp.bfloat16))

    assert logical_bytes(Holder()) == 12 + 8


def test_a_variant_that_the_device_refuses_is_listed_with_its_reason(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no such product\nsecond line")

    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(cases_module, "quantized_attention", refuse)
    report = bench.run_bench(shapes=("small",), recipes=(), repeats=1)
    names = ["attention/int8-qk", "attention/int8-qk-pv", "attention/float8-qk-pv"]
    assert [row["name"] for row in report["failed"]] == names
    assert report["failed"][0]["reason"] == "NotImplementedError: no such product"


def test_a_model_that_does_not_fit_is_scaled_from_its_block(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(bench_module, "memory_bytes", lambda: 1000)
    report = bench.run_bench(shapes=("small",), recipes=("rtn-w4a8",), repeats=1)
    rows = {row["name"]: row for row in report["results"]}
    assert rows["step/rtn-w4a8"]["median_ms"] == SMALL.layers * rows["block/rtn-w4a8"]["median_ms"]
    assert "2 blocks" in rows["step/rtn-w4a8"]["scaled"]


def test_what_the_budget_leaves_out_is_listed(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", SMALL)
    report = bench.run_bench(shapes=("small",), recipes=(), repeats=1, budget_seconds=-1)
    assert report["results"] == []
    assert [row["name"] for row in report["left_out"]] == ["linear", "attention", "block", "step"]


@pytest.mark.parametrize(
    "options",
    [{"suite": "all"}, {"shapes": ("big",)}, {"recipes": ("rtn",)}, {"suite": "tiny", "repeats": 0}],
)
def test_unknown_names_are_refused_before_anything_is_timed(options):
    with pytest.raises(UserError):
        bench.run_bench(**options)


def test_rows_say_what_computed_them_and_how_near_the_peak_they_came(report):
    rows = {row["name"]: row for row in report["results"]}
    assert rows["linear/rtn-w8a8"]["implementation"] == "xla"
    assert "int32" in rows["linear/rtn-w8a8"]["reason"]
    assert rows["attention/int8-qk"]["implementation"] == "xla"
    width, hidden, tokens = SMALL.width, SMALL.hidden, SMALL.tokens
    moved = rows["linear/rtn-w8a8"]["weight_bytes"] + 4 * tokens * (width + hidden)  # the layer, its input and output
    assert rows["linear/rtn-w8a8"]["least_bytes"] == moved
    for row in report["results"]:
        assert row["fraction_of_peak"] > 0
        assert row["least_bytes"] > 0
        assert not row["rival"]
    assert report["rates"]["memory_giga_bytes"] > 0
    assert [row["name"] for row in report["references"]] == [
        "linear/float32", "attention/float32", "block/float32", "step/float32",
    ]  # fmt: skip


def test_the_full_suite_goes_from_kernels_to_videos():
    tasks = [(kind, shape.name) for kind, shape in bench_module._tasks("full", None)]
    kinds = [kind for kind, _ in tasks]
    assert list(dict.fromkeys(kinds)) == ["linear", "attention", "block", "step", "sample"]
    assert ("step", "tiny-animatediff") in tasks
    assert ("block", "tiny-animatediff") not in tasks  # no block stands for all


def test_on_an_accelerator_the_full_suite_holds_the_real_shapes(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tasks = [(kind, shape.name) for kind, shape in bench_module._tasks("full", None)]
    named = {name for _, name in tasks}
    assert named == {
        "wan2.1-1.3b-480p", "wan2.1-14b-480p", "wan2.1-1.3b-720p", "wan2.1-14b-720p", "cogvideox-2b-480p",
        "cogvideox-5b-480p", "hunyuanvideo-720p", "animatediff-512",
    }  # fmt: skip
    assert ("sample", "wan2.1-1.3b-480p") in tasks
    assert ("sample", "wan2.1-14b-720p") not in tasks


def test_rivals_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    report = {"left_out": [], "failed": []}
    case = cases_module.Case("linear", SMALL, None, [], rivals=rivals.linear_rivals(2, 3, 4, jnp.float32))
    assert bench_module._rivals(case, report) == {}
    assert {row["name"]: row["reason"] for row in report["left_out"]} == {
        "linear/torch": "not installed: torch", "linear/torch-compile": "not installed: torch",
        "linear/torchao-int8-dynamic": "not installed: torch, torchao", "linear/qwix-int8": "not installed: qwix",
    }  # fmt: skip


def test_a_rival_is_timed_as_ours_are():
    pytest.importorskip("torch")
    plain = rivals.linear_rivals(5, 3, 4, jnp.float32)[0]
    function, arguments = plain.make()
    timed = rivals.TorchTimed(function, *arguments)
    assert tuple(function(*arguments).shape) == (1, 5, 4)
    assert timed.compile_seconds > 0
    assert 0 < timed.sample(2) < 60


@pytest.mark.slow
def test_the_full_suite_runs_on_a_cpu(monkeypatch):
    # One family stands for all; PyTorch's compiler, which takes minutes of C++, gives back what it is given.
    monkeypatch.setattr(bench_module, "TINY", ("tiny",))
    monkeypatch.setattr(pytest.importorskip("torch"), "compile", lambda module: module)
    report = bench.run_bench("full", recipes=("rtn-w8a8",), repeats=1)
    assert report["failed"] == []
    timed = {(row["kind"], row["shape"]) for row in report["results"]}
    assert timed == {(kind, shape.name) for kind, shape in bench_module._tasks("full", None)}
    assert all(not math.isnan(row["ratio"]) for row in report["results"])
    # What is not installed here is named, and what is was timed.
    for name, version in report["rivals"].items():
        if version is None:
            assert any(name in row["reason"] for row in report["left_out"])


def test_suites_are_the_shapes_and_the_default():
    assert set(bench.SUITES) == {"default", "full", *SHAPES}
    assert bench.SUITES == bench_module.SUITES
    assert set(LATENT_SIZES["wan"]) >= {"480p", "720p"}


def test_the_command_is_kept_without_the_place_of_the_program():
    assert _command(["/some/where/experiments/bench/__main__.py", "--suite", "tiny"]) == (
        "python -m experiments.bench --suite tiny"
    )
    assert _command(["/usr/bin/qvdjax", "bench"]) == "qvdjax bench"
