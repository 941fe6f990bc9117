"""Wan's original key names (Wan-Video/Wan2.1 `wan/modules/model.py`) and diffusers' names for the same
tensors.

Community files (ComfyUI, LightX2V, GGUF converters) use the original names too. The two norms of a block
that the original calls norm3 and norm2 are norm2 and norm3 in diffusers: the one with weights, before
cross-attention, is `norm3` there and `norm2` here.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from conversion.original import check_stated, shape_of, without_prefix
from conversion.place import Place
from qvdjax.errors import UserError

# (original, diffusers): module names outside the blocks, then inside one. `.weight` and `.bias` follow.
_OUTSIDE = (
    ("patch_embedding", "patch_embedding"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)
_INSIDE = (
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("norm3", "norm2"),
    ("norm2", "norm3"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)
_PARAMETERS = ("head.modulation", "img_emb.emb_pos", "modulation")  # tensors themselves, not modules
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
HEAD_DIM = 128
ASSUMED = f"a head is taken to have {HEAD_DIM} features"


def is_original(keys: Iterable[str]) -> bool:
    """Whether these are original names: their blocks hold `self_attn`, which diffusers never says."""
    return any(re.match(r"blocks\.\d+\.self_attn\.", without_prefix(key)) for key in keys)


def to_diffusers(key: str) -> str | None:
    """Diffusers' name of an original key, with or without ComfyUI's prefix; None for a key not Wan's."""
    return _rename(without_prefix(key), original=0, other=1)


def to_original(key: str) -> str | None:
    """The original name of a diffusers key; None for a key not Wan's."""
    return _rename(key, original=1, other=0)


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Diffusers' name -> where it lies, for all original tensors of these shapes (of known names)."""
    return {to_diffusers(key): Place(key) for key in shapes}


def _rename(key: str, original: int, other: int) -> str | None:
    block = _BLOCK.fullmatch(key)
    head, rest, table = (f"blocks.{block[1]}.", block[2], _INSIDE) if block else ("", key, _OUTSIDE)
    for row in table:
        if row[0] in _PARAMETERS:
            if rest == row[original]:
                return head + row[other]
        elif rest in (f"{row[original]}.weight", f"{row[original]}.bias"):
            return head + row[other] + rest.removeprefix(row[original])
    return None


def infer_config(tensors: Mapping[str, Any], original_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of diffusers' config.json, read from shapes.

    What shapes do not tell comes from the original config.json (`num_heads`, `eps`) where there is one;
    otherwise a head has 128 features and eps is 1e-6, as in every released Wan.

    Args:
        tensors: diffusers key -> anything with `shape`.
        original_config: The original config.json, or {}.

    Raises:
        UserError: Tensors that decide are missing; the width is no multiple of the head; the original config
            contradicts the shapes.
    """

    shape = functools.partial(shape_of, tensors, remedy="put the checkpoint's config.json beside the weights")

    width, in_channels, *patch = shape("patch_embedding.weight", 5)
    ffn_dim, _ = shape("blocks.0.ffn.net.0.proj.weight", 2)
    outputs, _ = shape("proj_out.weight", 2)
    heads = original_config.get("num_heads", width // HEAD_DIM)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"a width of {width} is no {heads} heads (without config.json, a head is {HEAD_DIM})",
            remedy="put the checkpoint's config.json beside the weights",
        )
    image = "condition_embedder.image_embedder.norm1.weight" in tensors
    config = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": outputs // (patch[0] * patch[1] * patch[2]),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": ffn_dim,
        "num_layers": len({block[1] for key in tensors if (block := _BLOCK.fullmatch(key))}),
        "cross_attn_norm": "blocks.0.norm2.weight" in tensors,
        "qk_norm": "rms_norm_across_heads",
        "eps": original_config.get("eps", 1e-6),
        "image_dim": shape("condition_embedder.image_embedder.norm1.weight", 1)[0] if image else None,
        "added_kv_proj_dim": shape("blocks.0.attn2.add_k_proj.weight", 2)[1] if image else None,
        "rope_max_seq_len": 1024,
    }
    shapes = {
        "dim": width,
        "ffn_dim": ffn_dim,
        "freq_dim": config["freq_dim"],
        "num_layers": config["num_layers"],
        "in_dim": in_channels,
        "out_dim": config["out_channels"],
    }
    check_stated(original_config, shapes)
    return config


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The original config.json for the fields of diffusers' one."""
    return {
        "_class_name": "WanModel",
        "model_type": "i2v" if config.get("image_dim") else "t2v",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "text_len": 512,
        "eps": config["eps"],
    }
