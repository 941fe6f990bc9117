"""The choice of an implementation, its reason, and refusals."""

import json
from importlib import resources

import jax
import jax.numpy as jnp
import pytest

from qvdjax.errors import UserError
from qvdjax.kernels import Device, attention_choice, quantized_attention_choice, target, tuning
from qvdjax.kernels.dispatch import Option, choose
from qvdjax.parallel import make_mesh, topology_mesh

OPTIONS = (
    Option("cudnn", "it is 1999", "fast"), Option("pallas_tpu", None), Option("xla", None, "it takes everything"),
)  # fmt: skip


def test_the_first_preferred_option_that_takes_the_arrays_is_chosen_with_its_reason():
    choice = choose("tea", OPTIONS, None)
    assert (choice.implementation, choice.reason) == ("xla", "it takes everything")
    assert choice.refused == (("cudnn", "it is 1999"),)


def test_what_is_asked_for_is_run():
    assert choose("tea", OPTIONS, "pallas_tpu").implementation == "pallas_tpu"


@pytest.mark.parametrize(("asked", "said"), [
    ("cudnn", "tea: cudnn cannot be run: it is 1999; use pallas_tpu or xla"),
    ("mapped", "tea has no implementation 'mapped'"),
    ("magic", "tea: unknown implementation 'magic'"),
])  # fmt: skip
def test_refusals_say_why_and_what_to_do(asked, said):
    with pytest.raises(UserError) as raised:
        choose("tea", OPTIONS, asked)
    assert str(raised.value).startswith(said)


def qk(tokens=1024, head_dim=128, dtype=jnp.bfloat16):
    return (jax.ShapeDtypeStruct((1, tokens, 4, head_dim), dtype),) * 2


def quantized(arrays, **options):
    given = {"qk_bits": 8, "pv_bits": 8, "pv_block": 512, **options}
    return quantized_attention_choice(*arrays, **given)


def test_on_a_cpu():
    assert target() == Device("cpu", "cpu")
    assert attention_choice(*qk()).implementation == "mapped"
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        assert attention_choice(*qk()).implementation == "xla"  # a batch that is split would be gathered
    choice = quantized(qk())
    assert choice.implementation == "xla"
    assert dict(choice.refused)["pallas_tpu"] == "the program is for cpu"
    with pytest.raises(UserError, match="pallas_tpu cannot be run: the program is for cpu"):
        quantized(qk(), asked="pallas_tpu")


@pytest.mark.tpu_compile
def test_for_a_described_tpu():
    with jax.set_mesh(topology_mesh("v5e:2x4")):
        assert target() == Device("tpu", "TPU v5 lite")
        assert attention_choice(*qk()).implementation == "pallas_tpu"
        assert attention_choice(*qk(tokens=77)).implementation == "xla"
        assert attention_choice(*qk(tokens=77), asked="pallas_tpu").implementation == "pallas_tpu"
        for arrays in (qk(), qk(head_dim=64), qk(head_dim=72), qk(tokens=77), qk(dtype=jnp.float32)):
            assert quantized(arrays).implementation == "pallas_tpu"
        for arrays, options, why in (
            (qk(dtype=jnp.float16), {}, "float16"),
            (qk(head_dim=512), {}, "more than 256"),
            (qk(), {"pv_block": None}, "share a range over all keys"),
            (qk(), {"pv_block": 100}, "multiple of 128"),
            (qk(), {"key_block": 100}, "multiple of 512"),
        ):
            choice = quantized(arrays, **options)
            assert choice.implementation == "xla"
            assert why in dict(choice.refused)["pallas_tpu"]


def test_tables_are_whole():
    files = [file for file in resources.files(tuning).iterdir() if file.name.endswith(".json")]
    assert files
    kinds = []
    for file in files:
        table = json.loads(file.read_text())
        assert table["source"]
        kinds += table["device_kinds"]
        for kind in table["device_kinds"]:
            assert tuning.source(Device("tpu", kind)) == table["source"]
        for operation in table.keys() - {"device_kinds", "source"}:
            assert "at_most" not in table[operation][-1]  # the last row is for all that is larger
    assert len(kinds) == len(set(kinds))


def test_rows_of_a_table_are_found_by_size(monkeypatch):
    rows = [{"at_most": {"tokens": 100}, "block": 1}, {"block": 2}]
    monkeypatch.setattr(tuning, "_tables", lambda: {"chip": {"sum": rows}})
    chip = Device("tpu", "chip")
    assert tuning.settings("sum", chip, tokens=100) == {"block": 1}
    assert tuning.settings("sum", chip, tokens=101) == {"block": 2}
    assert tuning.settings("product", chip, tokens=1) is None
    assert tuning.settings("sum", Device("tpu", "other"), tokens=1) is None
