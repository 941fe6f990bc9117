"""Models in and out of folders: names, exactness, types, shardings, refusals, corrupted files."""

import json
import struct
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qvdjax.checkpoint import (
    SafetensorsFile,
    TensorSource,
    load_variables,
    loading,
    save_variables,
    write_file,
)
from qvdjax.checkpoint.folder import WEIGHTS
from qvdjax.errors import UserError
from qvdjax.nn import Stack, VideoModel
from qvdjax.nn.variables import Codes


@pytest.fixture
def saved(tiny, tmp_path):
    """(folder, model, abstract model)."""
    model, abstract = tiny()
    save_variables(model, tmp_path / "model", model.config.to_dict())
    return tmp_path / "model", model, abstract


@pytest.fixture(params=[64 << 20, 0], ids=["staged on the host", "row by row on the device"])
def stage(request, monkeypatch):
    """Both ways of filling an array."""
    monkeypatch.setattr(loading, "_STAGE_BYTES", request.param)


def rewrite(path, change):
    """Change the tensors of a folder: `change` gets and may replace a dictionary of arrays."""
    file = SafetensorsFile(path / WEIGHTS)
    values = {name: file.read(name) for name in file.tensors}
    values = change(values) or values
    write_file(path / WEIGHTS, [TensorSource(k, v.shape, v.dtype, lambda v=v: v) for k, v in values.items()])


def test_tensors_have_the_names_and_shapes_of_the_disk(saved):
    path, _, _ = saved
    found = {key: (str(i.dtype), i.shape) for key, i in SafetensorsFile(path / WEIGHTS).tensors.items()}
    block = {
        "to_q.weight_scale": ("float32", (6, 1)),
        "to_q.weight_sqnr_db": ("float32", ()),
        "to_q.bias": ("float32", (6,)),
        "table": ("float32", (1, 2, 4)),
        "ffn.net.0.weight": ("float32", (10, 4)),
        "ffn.net.0.bias": ("float32", (10,)),
    }
    # 11 codes of 4 bits are 44 bits, two words; of 3 bits 33 bits, two words; 8 bits are not packed.
    packed = {"to_q.weight_packed": ("int32", (6, 2)), "to_q.weight_shape": ("int64", (2,))}
    whole = {"to_q.weight": ("int8", (6, 11))}
    expected = {"proj_out.weight": ("float32", (6, 4)), "proj_out.bias": ("float32", (6,))}
    expected["counts"] = ("int32", (3,))
    whole_blocks, packed_blocks = ("blocks.2", "blocks.3", "blocks.4"), ("blocks.0", "blocks.1", "mid_block")
    for prefix in (*whole_blocks, *packed_blocks):
        codes = whole if prefix in whole_blocks else packed
        expected |= {f"{prefix}.{name}": value for name, value in (block | codes).items()}
    assert found == expected


@pytest.mark.parametrize("bits", [(2, 3, 4), (5, 6, 7), (8, 8, 8)])
def test_load_after_save_is_exact_and_saving_again_gives_the_same_bytes(tiny, tmp_path, stage, bits):
    model, abstract = tiny(bits=bits)
    save_variables(model, tmp_path / "one", model.config.to_dict())
    loaded = load_variables(abstract, tmp_path / "one")
    assert tiny.equal(loaded, model)
    assert isinstance(loaded.stacks[0].block.to_q.codes, type(model.stacks[0].block.to_q.codes))
    save_variables(loaded, tmp_path / "two", loaded.config.to_dict())
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_rows_lie_in_the_order_of_the_blocks(saved, stage):
    path, model, abstract = saved
    loaded = load_variables(abstract, path)
    row = SafetensorsFile(path / WEIGHTS).read("blocks.3.ffn.net.0.weight")
    np.testing.assert_array_equal(row, model.stacks[1].block.ffn["net"]["0"].weight[...][1])
    np.testing.assert_array_equal(row, loaded.stacks[1].block.ffn["net"]["0"].weight[...][1])


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_the_types_of_the_file_are_kept(saved, kind):
    path, _, abstract = saved
    with jax.enable_x64(True):
        weights = (".0.weight", "out.weight")
        rewrite(path, lambda v: {k: t.astype(kind) if k.endswith(weights) else t for k, t in v.items()})
        loaded = load_variables(abstract, path)
        assert loaded.proj_out.weight[...].dtype == loaded.stacks[0].block.ffn["net"]["0"].weight[...].dtype == kind
        assert loaded.proj_out.bias[...].dtype == np.float32
        save_variables(loaded, path, {}, overwrite=True)
        assert SafetensorsFile(path / WEIGHTS).tensors["blocks.1.ffn.net.0.weight"].dtype == kind
        assert (path / "config.json").read_text() == "{}\n"


def test_float64_values_survive_exactly(saved, tiny):
    path, _, abstract = saved
    exact = np.random.default_rng(0).standard_normal((6, 4))
    rewrite(path, lambda values: values.update({"proj_out.weight": exact}))
    with jax.enable_x64(True):
        loaded = load_variables(abstract, path)
        np.testing.assert_array_equal(np.asarray(loaded.proj_out.weight[...]), exact)
        save_variables(loaded, path, {}, overwrite=True)
        assert tiny.equal(load_variables(abstract, path), loaded)
    with pytest.warns(UserWarning, match="1 float64 tensors .*proj_out.weight.* are read as float32"):
        loaded = load_variables(abstract, path)
    np.testing.assert_array_equal(loaded.proj_out.weight[...], exact.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, np.float32])
def test_a_wanted_type_casts_weights_but_not_islands_scales_and_codes(saved, stage, dtype):
    path, model, abstract = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_variables(abstract, path, dtype=dtype)
    block, original = loaded.stacks[0].block, model.stacks[0].block
    assert block.to_q.bias[...].dtype == block.ffn["net"]["0"].weight[...].dtype == np.dtype(dtype)
    assert block.table[...].dtype == block.to_q.weight_scale[...].dtype == np.float32
    assert block.to_q.codes[...].dtype == original.to_q.codes[...].dtype
    assert loaded.counts[...].dtype == np.int32
    np.testing.assert_array_equal(block.to_q.bias[...], original.to_q.bias[...].astype(dtype))
    np.testing.assert_array_equal(block.table[...], original.table[...])


def test_rows_of_different_types_meet_in_the_wider_one(saved):
    path, model, abstract = saved
    key = "blocks.1.ffn.net.0.weight"
    rewrite(path, lambda values: values.update({key: values[key].astype(ml_dtypes.bfloat16)}))
    weight = load_variables(abstract, path).stacks[0].block.ffn["net"]["0"].weight[...]
    original = model.stacks[0].block.ffn["net"]["0"].weight[...]
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight[0], original[0])
    np.testing.assert_array_equal(weight[1], original[1].astype(jnp.bfloat16))


def test_float8_weights_are_read(saved):
    path, _, abstract = saved
    weight = np.arange(24).reshape(6, 4).astype(ml_dtypes.float8_e4m3fn)
    rewrite(path, lambda values: values.update({"proj_out.weight": weight}))
    loaded = load_variables(abstract, path, dtype=jnp.float32)
    np.testing.assert_array_equal(loaded.proj_out.weight[...], weight.astype(np.float32))


@pytest.mark.parametrize("spec", [(None, "a", "b"), (None, "b", "a"), (None, None, "a"), ("a", None, None), ()])
def test_every_sharding_gives_the_same_values(tiny, tmp_path, stage, spec):
    """Sizes that the mesh divides; the input axis of packed codes is cut within words."""
    model, abstract = tiny()
    save_variables(model, tmp_path / "model", {})
    mesh = jax.make_mesh((2, 1), ("a", "b"), devices=jax.devices()[:2], axis_types=(AxisType.Auto,) * 2)

    def place(variable):
        shape = variable.get_value().shape
        axes = spec[-len(shape) :] if len(shape) else ()
        fits = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape)]
        return variable.replace(NamedSharding(mesh, PartitionSpec(*fits)))

    shardings = jax.tree.map(place, abstract, is_leaf=lambda v: isinstance(v, nnx.Variable))
    loaded = load_variables(abstract, tmp_path / "model", shardings=shardings)
    assert tiny.equal(loaded, model)
    codes = loaded.stacks[0].block.to_q.codes[...]
    assert codes.sharding == shardings.stacks[0].block.to_q.codes.get_value()
    save_variables(loaded, tmp_path / "again", {})
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "model" / WEIGHTS).read_bytes()


def codes_alone(values, bits):
    """A model of one stack whose blocks hold codes [layers, out, in] and nothing else."""

    class Block(nnx.Module):
        def __init__(self):
            self.codes = Codes(jnp.asarray(values, jnp.int4), axes=(None, None), bits=bits)

    class Model(VideoModel):
        def __init__(self):
            self.stacks = nnx.List([Stack(Block(), prefix="blocks", count=len(values))])

    return Model()


@pytest.mark.parametrize("axis", ["out", "in", None])
def test_stacks_of_int4_are_filled_as_bytes_of_two_codes(tmp_path, monkeypatch, axis):
    """Row by row, XLA on a CPU writes a whole int4 stack anew for each row: minutes at a real size."""
    values = np.random.default_rng(0).integers(-8, 8, (3, 4, 12))
    monkeypatch.setattr(loading, "_STAGE_BYTES", 0)
    updated = []

    def put_row(stack, row, i, put_row=loading._put_row):
        updated.append((str(stack.dtype), stack.shape, row.shape))
        return put_row(stack, row, i)

    monkeypatch.setattr(loading, "_put_row", put_row)
    model = codes_alone(values, bits=4)
    save_variables(model, tmp_path / "model", {})
    mesh = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, *("a" if name == axis else None for name in ("out", "in"))))
    abstract = jax.eval_shape(lambda: codes_alone(values, bits=4))
    codes = load_variables(abstract, tmp_path / "model", shardings=sharding).stacks[0].block.codes[...]
    assert (codes.dtype, codes.sharding) == (jnp.int4, sharding)
    np.testing.assert_array_equal(np.asarray(codes), values)
    # Each of the two devices gets its own part, of all three layers.
    part = {"out": (2, 6), "in": (4, 3), None: (4, 6)}[axis]
    assert updated == [("uint8", (3, *part), part)] * 6


def test_codes_split_along_the_input_axis(tmp_path, stage):
    """An input axis of 12 codes of 3 bits, on four devices: 9 bits each, cut in the middle of a word."""
    make = lambda: codes_alone(np.random.default_rng(0).integers(-4, 4, (2, 5, 12)), bits=3)  # noqa: E731
    model = make()
    save_variables(model, tmp_path / "model", {})
    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "a"))
    codes = load_variables(jax.eval_shape(make), tmp_path / "model", shardings=sharding).stacks[0].block.codes[...]
    assert codes.sharding == sharding
    np.testing.assert_array_equal(np.asarray(codes), np.asarray(model.stacks[0].block.codes[...]))


# --- refusals


def change_one(key, make):
    return lambda values: values.update({key: make(values[key])})


REFUSED = {
    "an extra key": (
        lambda v: v.update(stranger=np.zeros(2, np.float32)),
        ["stranger (unknown)"],
        "1 unknown",
    ),
    "a missing key": (
        lambda values: {k: v for k, v in values.items() if k != "blocks.1.table"},
        ["blocks.1.table (missing)"],
        "1 missing",
    ),
    "a transposed weight": (
        change_one("blocks.1.ffn.net.0.weight", np.transpose),
        ["blocks.1.ffn.net.0.weight (shape [4, 10] instead of [10, 4], it appears to be transposed)"],
        "1 of the wrong shape",
    ),
    "a wrong shape": (
        change_one("proj_out.weight", lambda w: np.zeros((6, 5), np.float32)),
        ["proj_out.weight (shape [6, 5] instead of [6, 4])"],
        "1 of the wrong shape",
    ),
    "integers for a float": (
        change_one("proj_out.weight", lambda w: np.zeros((6, 4), np.int8)),
        ["proj_out.weight (int8 instead of a floating type)"],
        "1 of the wrong shape or type",
    ),
    "floats for codes": (
        change_one("blocks.2.to_q.weight", lambda w: w.astype(np.float32)),
        ["blocks.2.to_q.weight (float32 instead of int8)"],
        "1 of the wrong shape or type",
    ),
    "unsigned codes": (
        change_one("blocks.2.to_q.weight", lambda w: w.view(np.uint8)),
        ["blocks.2.to_q.weight (uint8 instead of int8)"],
        "1 of the wrong shape or type",
    ),
    "codes of another width": (
        change_one("blocks.0.to_q.weight_packed", lambda w: np.zeros((6, 3), np.int32)),
        ["blocks.0.to_q.weight_packed (shape [6, 3] instead of [6, 2])"],
        "1 of the wrong shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_fit_are_refused_by_name(saved, case):
    path, _, abstract = saved
    change, items, words = REFUSED[case]
    rewrite(path, change)
    with pytest.raises(UserError) as error:
        load_variables(abstract, path)
    assert list(error.value.items) == items
    assert words in str(error.value)
    assert items[0] in str(error.value)


def test_everything_wrong_is_in_one_error(saved):
    path, _, abstract = saved

    def change(values):
        for i in range(5):
            values[f"blocks.{i}.attn.weight"] = values.pop(f"blocks.{i}.ffn.net.0.weight")
        values["proj_out.bias"] = np.zeros(7, np.float32)

    rewrite(path, change)
    with pytest.raises(UserError) as error:
        load_variables(abstract, path)
    assert len(error.value.items) == 11
    text = str(error.value)
    assert "5 missing, 5 unknown, 1 of the wrong shape or type" in text
    for first in ("blocks.0.ffn.net.0.weight (missing)", "attn.weight (unknown)", "proj_out.bias (shape [7]"):
        assert first in text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused_and_all_named(saved, bad, kind):
    path, _, abstract = saved

    def change(values):
        for key in ("blocks.1.ffn.net.0.weight", "proj_out.weight"):
            values[key] = values[key].astype(kind)
            values[key][-1, -1] = bad

    rewrite(path, change)
    with pytest.raises(UserError, match="NaN or infinite weights") as error:
        load_variables(abstract, path)
    # Not the recorded signal-to-noise ratios, which are infinite in this model and may be.
    assert set(error.value.items) == {"blocks.1.ffn.net.0.weight", "proj_out.weight"}


def test_scales_must_be_finite_too(saved):
    path, _, abstract = saved
    rewrite(path, change_one("blocks.0.to_q.weight_scale", lambda s: s * np.float32(np.nan)))
    with pytest.raises(UserError, match="NaN or infinite"):
        load_variables(abstract, path)


def test_weights_that_overflow_the_wanted_type_are_refused(saved):
    path, _, abstract = saved
    rewrite(path, change_one("proj_out.weight", lambda w: w + np.float32(1e6)))
    with pytest.raises(UserError, match="proj_out.weight overflows float16; choose a type with a wider range"):
        load_variables(abstract, path, dtype=np.float16)
    load_variables(abstract, path, dtype=jnp.bfloat16)


def test_a_weight_shape_that_contradicts_the_model_is_refused(saved):
    path, _, abstract = saved
    rewrite(path, change_one("blocks.0.to_q.weight_shape", lambda s: s[::-1].copy()))
    with pytest.raises(UserError, match=r"weight_shape says \[11, 6\], the model needs \[6, 11\]"):
        load_variables(abstract, path)


# --- corruption


def outcome(path, abstract):
    """The model of a folder, or None where it is refused; any other exception escapes."""
    try:
        return load_variables(abstract, path)
    except UserError:
        return None


def header_bytes(content):
    return 8 + struct.unpack("<Q", content[:8])[0]


EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def edit(content, edits, low, high):
    """Apply edits at relative positions between two offsets."""
    content = bytearray(content)
    for kind, position, value in edits:
        at = low + int(position * (high - low))
        if kind == "set":
            content[at] = value
        elif kind == "insert":
            content.insert(at, value)
        elif at < len(content):
            del content[at]
    return bytes(content)


@given(edits=EDITS)
def test_a_corrupted_header_is_refused_or_changes_nothing(corruptible, edits):
    """What may be accepted is a header that says the same: other white space, other metadata."""
    path, model, abstract, content, equal = corruptible
    (path / WEIGHTS).write_bytes(edit(content, edits, 0, header_bytes(content)))
    loaded = outcome(path, abstract)
    assert loaded is None or equal(loaded, model)


@given(edits=EDITS)
def test_corruption_anywhere_never_ends_in_another_exception(corruptible, edits):
    """Also in the tensors, where a changed byte that stays finite cannot be told from another weight."""
    path, model, abstract, content, _ = corruptible
    (path / WEIGHTS).write_bytes(edit(content, edits, 0, len(content)))
    loaded = outcome(path, abstract)
    if loaded is not None:
        assert layout(loaded) == layout(model)


def layout(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {path: (variable.get_value().shape, variable.get_value().dtype) for path, variable in state}


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_never_accepted(corruptible, cut):
    path, _, abstract, content, _ = corruptible
    (path / WEIGHTS).write_bytes(content[: int(cut * len(content))])
    assert outcome(path, abstract) is None


@given(data=st.data())
def test_header_fields_with_another_meaning_are_never_accepted(corruptible, data):
    """Valid JSON, valid lengths, one field changed: name, type, shape or place."""
    path, _, abstract, content, _ = corruptible
    size = header_bytes(content)
    header = json.loads(content[8:size])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    field = data.draw(st.sampled_from(["name", "dtype", "shape", "data_offsets"]))
    if field == "name":
        other = data.draw(st.text(max_size=8).filter(lambda text: text not in header))
        header[other] = header.pop(name)
    elif field == "dtype":
        kinds = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "X"]
        header[name]["dtype"] = data.draw(st.sampled_from([k for k in kinds if k != header[name]["dtype"]]))
    else:
        values = header[name][field]
        if not values:
            values.append(0)
        else:
            i = data.draw(st.integers(0, len(values) - 1))
            values[i] = data.draw(st.integers(-4, 2000).filter(lambda n: n != values[i]))
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[size:])
    assert outcome(path, abstract) is None
