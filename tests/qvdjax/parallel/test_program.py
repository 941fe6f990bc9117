import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.parallel import Program, make_mesh


def compiled_text(f, mesh, *arguments):
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, p)) for s, d, p in arguments]
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*arguments).compile().as_text()


def test_collectives_inside_a_loop_count_as_often_as_it_turns():
    def step(weights, x):
        def body(x, w):
            w = jax.lax.with_sharding_constraint(w, P(None, None))
            return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32).astype(
                jnp.int8
            ), None

        return jax.lax.scan(body, x, weights)[0]

    mesh = make_mesh({"fsdp": 8})
    text = compiled_text(step, mesh, ((6, 64, 64), jnp.int8, P(None, "fsdp")), ((16, 64), jnp.int8, P("fsdp")))
    program = Program(text)
    gathers = [row for row in program.collectives() if row["kind"] == "all-gather"]
    assert gathers == [{"kind": "all-gather", "dtype": "s8", "bytes": 6 * 64 * 64, "count": 6}]
    assert program.products() == [{"left": "s8", "right": "s8", "result": "s32", "count": 6}]
    assert program.unknown_loops == 0


def test_nested_loops_multiply():
    def step(x):
        inner = lambda x: jax.lax.scan(lambda x, _: (jnp.dot(x, x), None), x, length=3)[0]  # noqa: E731
        return jax.lax.scan(lambda x, _: (inner(x), None), x, length=5)[0]

    text = compiled_text(step, make_mesh({}), ((32, 32), jnp.float32, P()))
    assert sum(row["count"] for row in Program(text).products()) == 15


def test_a_sum_over_devices_is_an_all_reduce_of_the_part():
    text = compiled_text(
        lambda x, w: jnp.dot(x, w), make_mesh({"tensor": 8}),
        ((32, 64), jnp.float32, P(None, "tensor")), ((64, 16), jnp.float32, P("tensor", None)),
    )  # fmt: skip
    assert Program(text).collectives() == [{"kind": "all-reduce", "dtype": "f32", "bytes": 32 * 16 * 4, "count": 1}]


# What the TPU compiler writes, shortened: no trip count, asynchronous pairs, four-bit codes, a fused
# reduce-scatter.
TPU = """\
HloModule jit_f, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[8,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, to_apply=%add
  ROOT %slice.1 = bf16[8,32]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.9, %c), dynamic_slice_sizes={8,32}
}

%body (arg: (s32[], s4[6,8,64])) -> (s32[], s4[6,8,64]) {
  %arg = (s32[]{:T(128)}, /*index=1*/s4[6,8,64]{2,1,0:T(64,128)(8,1)E(4)}) parameter(0)
  %code = s4[8,64]{1,0:T(64,128)(8,1)E(4)S(1)} slice(%arg), slice={[0:1]}
  %gather-start = (s4[8,64]{1,0:T(64,128)(8,1)E(4)}, s4[64,64]{1,0:E(4)}) all-gather-start(%code), dimensions={0}
  %gather-done = s4[64,64]{1,0:T(64,128)(8,1)E(4)} all-gather-done(%gather-start)
  %part = bf16[64,32]{1,0:T(8,128)(2,1)} convert(%gather-done)
  %scattered = bf16[8,32]{1,0:T(8,128)(2,1)} fusion(%part), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, s4[6,8,64]{2,1,0}) tuple(%arg, %arg)
}

%condition (arg.1: (s32[], s4[6,8,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %arg.1 = (s32[]{:T(128)}, s4[6,8,64]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (p: (s32[], s4[6,8,64])) -> (s32[], s4[6,8,64]) {
  %p = (s32[]{:T(128)}, s4[6,8,64]{2,1,0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, s4[6,8,64]{2,1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_a_tpu_program_is_read_alike():
    assert Program(TPU).collectives() == [
        {"kind": "reduce-scatter", "dtype": "bf16", "bytes": 6 * 64 * 32 * 2, "count": 6},
        {"kind": "all-gather", "dtype": "s4", "bytes": 6 * 64 * 64 // 2, "count": 6},
    ]


# A gather that begins and ends around a loop of other work and goes on inside it, as attention's loop over queries has
# it on v5e: four computations, one collective.
SPREAD = """\
HloModule jit_f, is_scheduled=true

%fused_computation.1 (shard: bf16[8,64]) -> bf16[64,64] {
  %shard = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,64]{1,0} all-gather(%shard), channel_id=7, dimensions={0}
}

%async_collective_fusion.2 (shard.2: bf16[8,64]) -> bf16[64,64] {
  %shard.2 = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0} all-gather(%shard.2), channel_id=7, dimensions={0}
}

%fused_computation.3 (shard.3: bf16[8,64]) -> bf16[64,64] {
  %shard.3 = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[64,64]{1,0} all-gather(%shard.3), channel_id=7, dimensions={0}
}

%body (arg: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %arg = (s32[], bf16[8,64]{1,0}) parameter(0)
  %own = bf16[8,64]{1,0} get-tuple-element(%arg), index=1
  %going-on = bf16[64,64]{1,0} fusion(%own), kind=kCustom, calls=%async_collective_fusion.2
  %other = bf16[64,64]{1,0} all-gather(%own), channel_id=8, dimensions={0}
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%arg, %own)
}

ENTRY %main (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]{1,0}) parameter(0)
  %q = bf16[8,64]{1,0} get-tuple-element(%p), index=1
  %begin = bf16[64,64]{1,0} fusion(%q), kind=kLoop, calls=%fused_computation.1
  %loop = (s32[], bf16[8,64]{1,0}) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"86"}}
  %end = bf16[64,64]{1,0} fusion(%q), kind=kLoop, calls=%fused_computation.3
  ROOT %result = (s32[], bf16[8,64]{1,0}) tuple(%p, %q)
}
"""


def test_a_collective_spread_over_a_loop_counts_once():
    (row,) = Program(SPREAD).collectives()
    assert row == {"kind": "all-gather", "dtype": "bf16", "bytes": (86 + 1) * 64 * 64 * 2, "count": 86 + 1}


def test_a_loop_without_a_bound_counts_once_and_is_reported():
    program = Program(TPU.replace("constant(6)", "parameter(1)"))
    assert program.unknown_loops == 1
    assert [row["count"] for row in program.collectives()] == [1, 1]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        Program("nothing here")


# A fused product that writes bfloat16, an unfused one that writes int32, and one in a loop that turns three times.
WRITTEN = """\
HloModule jit_f, is_scheduled=true

%fused.1 (p0: s8[64,32], p1: s8[16,32]) -> bf16[64,16] {
  %p0 = s8[64,32]{1,0} parameter(0)
  %p1 = s8[16,32]{1,0} parameter(1)
  %sum.1 = s32[64,16]{1,0} convolution(%p0, %p1), dim_labels=bf_oi->bf
  ROOT %convert.1 = bf16[64,16]{1,0} convert(%sum.1)
}

%body.1 (t: (s32[], s8[64,32])) -> (s32[], s8[64,32]) {
  %t = (s32[], s8[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = s8[64,32]{1,0} get-tuple-element(%t), index=1
  %copy.1 = s32[64,32]{1,0} convert(%x), backend_config={"estimated_cycles":"5"}
  ROOT %r = (s32[], s8[64,32]{1,0}) tuple(%i, %x)
}

%condition.1 (t: (s32[], s8[64,32])) -> pred[] {
  %t.2 = (s32[], s8[64,32]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main.1 (a: s8[64,32], b: s8[16,32]) -> bf16[64,16] {
  %a = s8[64,32]{1,0} parameter(0)
  %b = s8[16,32]{1,0} parameter(1)
  %sum.2 = s32[64,16]{1,0} convolution(%a, %b), dim_labels=bf_oi->bf, backend_config={"estimated_cycles":"100"}
  %init = (s32[], s8[64,32]{1,0}) tuple(%zero, %a)
  %loop = (s32[], s8[64,32]{1,0}) while(%init), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[64,16]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused.1, backend_config={"estimated_cycles":"70"}
}
"""  # noqa: E501


def test_arrays_that_are_written_are_those_outside_fusions():
    program = Program(WRITTEN)
    assert program.written("s32", least=2) == [
        {"shape": (64, 32), "bytes": 4 * 64 * 32, "count": 3, "operations": ["copy.1"]},
        {"shape": (64, 16), "bytes": 4 * 64 * 16, "count": 1, "operations": ["sum.2"]},
    ]
    assert [row["operations"] for row in program.written("bf16")] == [["out"]]
    assert program.written("s8") == []  # arguments, and what a loop hands through


def test_estimated_cycles_count_loops_as_often_as_they_turn():
    assert Program(WRITTEN).estimated_cycles() == 100 + 70 + 3 * 5
    for largest in (2**64 - 1, 2**63 - 1):
        unknown = WRITTEN.replace('"estimated_cycles":"70"', f'"estimated_cycles":"{largest}"')
        assert Program(unknown).estimated_cycles() == 100 + 3 * 5
    silent = "ENTRY %main (a: f32[2]) -> f32[2] {\n  ROOT %a = f32[2]{0} parameter(0)\n}"
    assert Program(silent).estimated_cycles() is None
