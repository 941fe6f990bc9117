"""cuDNN's attention of float8 arrays, as one implementation of quantized attention on NVIDIA GPUs.

Its ranges are coarser than those of `qvdjax.kernels.quantized_attention`: one for all queries, one for all keys, one
for all values, and none that follows the probabilities. Its result is float8 too, rounded by up to 2^-4 of itself.

jax has it without a public name (jax/_src/cudnn/fused_attention_stablehlo.py). No GPU was at hand when it was written:
what goes in and comes out is tested with the product replaced, and it is lowered for CUDA.
"""

import math

import jax
import jax.numpy as jnp

from qvdjax.kernels.attention_preparation import prepared
from qvdjax.kernels.dispatch import Device
from qvdjax.kernels.head_split import over_heads
from qvdjax.numerics import Grid
from qvdjax.numerics.float8 import FLOAT8, LARGEST
from qvdjax.numerics.quantizer import largest_magnitude

# What 1 becomes among probabilities, and the largest value in the result. Sums of rounded probabilities exceed their
# whole by up to 2^-4, and what is larger than 448 would be NaN.
ONE = 256.0
CAPABLE = ("H100", "H200", "GH200", "B100", "B200", "GB200", "B300", "GB300")


def cudnn_refusal(
    query_shape: tuple[int, ...], dtype, device: Device, *, qk_bits: int | None, pv_bits: int | None,
    codebook: str | None, key_block: int | None, pv_block: int | None, lengths: bool = False,
) -> str | None:  # fmt: skip
    """Why it cannot take queries of a shape [batch, queries, heads, head_dim]; None where it can. `lengths` says that
    some keys do not count; the sizes of blocks that share a range do not matter, since all share one."""
    if not any(name in device.kind for name in CAPABLE):
        return f"it is for Hopper and Blackwell, and the program is for {device.kind}"
    if codebook != FLOAT8 or qk_bits is None or pv_bits is None:
        return f"it has products of {FLOAT8} alone, in both"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, not {jnp.dtype(dtype).name}"
    if query_shape[-1] % 16 or query_shape[-1] > 256:
        return f"heads of {query_shape[-1]} features are not a multiple of 16 up to 256"
    if lengths:
        return "all keys count there"
    return None


def cudnn_float8(query: jax.Array, key: jax.Array, value: jax.Array, *, smooth_key: bool = True) -> jax.Array:
    """Attention of float8 arrays; see `quantized_attention`. Under a mesh heads are split, and ranges with them
    (`qvdjax.kernels.head_split`).

    Args:
        query: [batch, queries, heads, head_dim].
        key, value: [batch, keys, heads, head_dim].

    Returns:
        Like query. NaN where one of the arrays has a NaN or an infinity, everywhere.
    """
    return over_heads(lambda *a: _on_one_device(*a, smooth_key=smooth_key), query, key, value)


def _on_one_device(query, key, value, *, smooth_key):
    dtype = query.dtype
    query, key, value = (a.astype(jnp.float32) for a in (query, key, value))
    key, value = prepared(key, value, None, smooth_key=smooth_key, axis=1)
    (q, q_scale), (k, k_scale), (v, v_scale) = (_codes(a) for a in (query, key, value))
    result_scale = v_scale * (LARGEST / ONE)
    scales = {
        "descale_q": q_scale, "descale_k": k_scale, "descale_v": v_scale,
        "scale_s": jnp.float32(ONE), "descale_s": jnp.float32(1 / ONE), "scale_o": 1 / result_scale,
    }  # fmt: skip
    out = _product(q, k, v, scales, 1 / math.sqrt(query.shape[-1]))
    return (out.astype(jnp.float32) * result_scale).astype(dtype)


def _codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An array as float8, and its one scale []; NaN where it has a NaN or an infinity."""
    grid = Grid(8, codebook=FLOAT8)
    scale = grid.from_largest(largest_magnitude(x, axis=None))
    return grid.operands(grid.encode(x, scale, None)), scale


def _product(q, k, v, scales: dict[str, jax.Array], factor: float) -> jax.Array:
    """All float8 [batch, tokens, heads, head_dim]; by cuDNN's names, a "descale" makes real numbers of codes and a
    "scale" codes of real numbers: of probabilities (s) and the result (o). Others are for gradients."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    given = {name: scales.get(name, jnp.float32(1)).reshape(1, 1, 1, 1) for name in cudnn.fp8_params_keys}
    return cudnn.dot_product_attention(q, k, v, fp8_params=given, scale=factor, use_fp8=True)[0]
