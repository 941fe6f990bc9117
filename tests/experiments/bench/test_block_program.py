"""What the TPU compiler makes of a quantized block at real sizes: compiled, never run."""

import pytest

from experiments.bench.block_program import compiled_block
from qvdjax.parallel.program import Program


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize("attention", [None, 8])
@pytest.mark.parametrize(("size", "width", "heads"), [("1.3b", 1536, 12), ("14b", 5120, 40)])
def test_a_w8a8_block_keeps_its_integers_in_the_chip(size, width, heads, attention):
    options = {"attention_qk_bits": attention, "attention_pv_bits": attention}
    compiled = compiled_block(f"wan2.1-{size}-480p", "rtn-w8a8", "v5e:2x2", {"context": 4}, **options)
    program = Program(compiled.as_text())
    activation = 32760 // 4 * width  # of one chip: the smallest array of all its tokens
    # Scales are applied where the int32 sums are made: none of them is written.
    assert program.written("s32", activation) == []
    integer = [row for row in program.products() if row["result"] == "s32"]
    assert sum(row["count"] for row in integer) == 10  # four of each attention, two of the feed-forward
    assert {(row["left"], row["right"]) for row in integer} == {("s8", "s8")}
    # No sum of integers, nor any other, crosses chips: tokens and heads change places in bfloat16, and weights travel
    # as codes; the float32 beside them are scales.
    collectives = {(row["kind"], row["dtype"]): row["bytes"] for row in program.collectives()}
    assert collectives.keys() == {("all-to-all", "bf16"), ("all-gather", "s8"), ("all-gather", "f32")}
    assert collectives["all-gather", "f32"] < 0.01 * collectives["all-gather", "s8"]
    # Both attentions are kernels, and scores of neither are written: the text's would be the largest arrays of all.
    assert program.written("f32", heads // 4 * 32760 * 512) == []
