"""HunyuanVideo's original tensors (Tencent-Hunyuan/HunyuanVideo `hyvideo/modules/models.py`, `token_refiner.py`) and
diffusers' tensors made of them.

The original fuses layers of one input: query, key and value, and in single-stream blocks the first layer of the
feed-forward too. Its last modulation has shift before scale, diffusers' has scale before shift. Both are rows of a
tensor in another place, so that a tensor of diffusers is some rows of an original one. The script that does it for
diffusers is `scripts/convert_hunyuan_video_to_diffusers.py`.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from conversion.original import check_stated, shape_of, without_prefix
from conversion.place import Place
from qvdjax.errors import UserError

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_MLP = (("fc1", "net.0.proj"), ("fc2", "net.2"))
# original module: diffusers' modules, whose rows it holds one after the other. `.weight` and `.bias` follow.
_OUTSIDE = {
    "img_in.proj": ("x_embedder.proj",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# (original, diffusers) name of a kind of block, and the modules inside one.
_BLOCKS = (
    ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", {
        "norm1": ("norm1",),
        "norm2": ("norm2",),
        "self_attn_qkv": _QKV,
        "self_attn_proj": ("attn.to_out.0",),
        **{f"mlp.{ours}": (f"ff.{theirs}",) for ours, theirs in _MLP},
        "adaLN_modulation.1": ("norm_out.linear",),
    }),
    ("double_blocks", "transformer_blocks", {
        "img_mod.linear": ("norm1.linear",),
        "img_attn_qkv": _QKV,
        "img_attn_q_norm": ("attn.norm_q",),
        "img_attn_k_norm": ("attn.norm_k",),
        "img_attn_proj": ("attn.to_out.0",),
        **{f"img_mlp.{ours}": (f"ff.{theirs}",) for ours, theirs in _MLP},
        "txt_mod.linear": ("norm1_context.linear",),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn_q_norm": ("attn.norm_added_q",),
        "txt_attn_k_norm": ("attn.norm_added_k",),
        "txt_attn_proj": ("attn.to_add_out",),
        **{f"txt_mlp.{ours}": (f"ff_context.{theirs}",) for ours, theirs in _MLP},
    }),
    ("single_blocks", "single_transformer_blocks", {
        "modulation.linear": ("norm.linear",),
        "linear1": (*_QKV, "proj_mlp"),
        "q_norm": ("attn.norm_q",),
        "k_norm": ("attn.norm_k",),
        "linear2": ("proj_out",),
    }),
)  # fmt: skip
_SWAPPED = "final_layer.adaLN_modulation.1"  # two halves, the other way round
# How the features of a head of 128 are shared out to frames, rows and columns (hyvideo/modules/models.py,
# HUNYUAN_VIDEO_CONFIG, rope_dim_list); shapes do not tell it.
ROPE = (16, 56, 56)
ASSUMED = "a head's features are taken to be shared out 16, 56, 56"


def is_original(keys: Iterable[str]) -> bool:
    """Whether these are original names: `double_blocks` with fused attention, as Flux's files do not have."""
    return any(re.match(r"double_blocks\.\d+\.img_attn_qkv\.", without_prefix(key)) for key in keys)


def to_diffusers(key: str) -> tuple[str, ...] | None:
    """Diffusers' names of the tensors that an original tensor holds, with or without ComfyUI's prefix, in order; None
    for a key not HunyuanVideo's."""
    path, _, parameter = without_prefix(key).rpartition(".")
    if parameter not in ("weight", "bias"):
        return None
    head, modules = "", _OUTSIDE.get(path)
    for original, ours, inside in _BLOCKS:
        if block := re.fullmatch(rf"{re.escape(original)}\.(\d+)\.(.+)", path):
            head, modules = f"{ours}.{block[1]}.", inside.get(block[2])
    return None if modules is None else tuple(f"{head}{module}.{parameter}" for module in modules)


def to_original(key: str) -> str | None:
    """The original tensor that holds a tensor of diffusers; None for a key not HunyuanVideo's."""
    path, _, parameter = key.rpartition(".")
    head, modules = "", _OUTSIDE
    for original, ours, inside in _BLOCKS:
        if block := re.fullmatch(rf"{re.escape(ours)}\.(\d+)\.(.+)", path):
            head, path, modules = f"{original}.{block[1]}.", block[2], inside
    found = (f"{head}{module}.{parameter}" for module, parts in modules.items() if path in parts)
    return next(found, None) if parameter in ("weight", "bias") else None


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Diffusers' name -> where it lies, for all original tensors of these shapes (of known names).

    Raises:
        UserError: A fused tensor has not the rows that its parts must have.
    """
    found = {}
    width = next((shape[0] for key, shape in shapes.items() if without_prefix(key) == "img_in.proj.weight"), 0)
    for key, shape in shapes.items():
        names, rows = to_diffusers(key), shape[0] if shape else 0
        if len(names) == 1:
            halves = ((rows // 2, rows), (0, rows // 2)) if without_prefix(key).startswith(_SWAPPED) else ((0, rows),)
            found[names[0]] = Place(key, halves)
            continue
        starts = [number * width for number in range(len(names))]
        stops = [*starts[1:], rows]
        if not width or (len(names) == 3 and rows != 3 * width) or rows <= starts[-1]:
            raise UserError(
                f"{key} has {rows} rows, which are no {len(names)} layers of a model of width {width}",
                remedy="use the released checkpoint",
            )
        found |= {name: Place(key, (part,)) for name, *part in zip(names, starts, stops, strict=True)}
    return found


def infer_config(tensors: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of diffusers' config.json, read from shapes.

    Shapes do not tell how a head's features are shared out to frames, rows and columns: that is `rope_dim_list` of the
    original configuration where there is one; otherwise a head has 128 features, 16 of them for frames.

    Args:
        tensors: diffusers key -> anything with `shape`.
        stated: The original configuration (its names in hyvideo/modules/models.py) as JSON, or {}.

    Raises:
        UserError: Tensors that decide are missing; the model is image-to-video; a head of other than 128 features
            without a configuration; the configuration contradicts the shapes.
    """

    shape = functools.partial(shape_of, tensors, remedy="use the released checkpoint")

    def blocks(prefix: str) -> int:
        return len({m[1] for key in tensors if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))})

    width, in_channels, *patch = shape("x_embedder.proj.weight", 5)
    (head,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    hidden, _ = shape("transformer_blocks.0.ff.net.0.proj.weight", 2)
    outputs, _ = shape("proj_out.weight", 2)
    out_channels = outputs // (patch[0] * patch[1] * patch[2])
    if in_channels != out_channels:
        raise UserError(
            f"this HunyuanVideo checkpoint takes {in_channels} channels and returns {out_channels}: it is "
            "image-to-video, which is not supported yet",
            remedy="use a text-to-video checkpoint",
        )
    rope = stated.get("rope_dim_list", list(ROPE))
    if not isinstance(rope, list) or not all(isinstance(n, int) for n in rope) or sum(rope) != head:
        raise UserError(
            f"rope_dim_list {rope} does not share out the {head} features of a head",
            remedy="put a config.json with the checkpoint's rope_dim_list beside the weights",
        )
    config = {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": blocks("transformer_blocks"),
        "num_single_layers": blocks("single_transformer_blocks"),
        "num_refiner_layers": blocks("context_embedder.token_refiner.refiner_blocks"),
        "mlp_ratio": hidden / width,
        "patch_size": patch[1],
        "patch_size_t": patch[0],
        "qk_norm": "rms_norm",
        "guidance_embeds": any(key.startswith("time_text_embed.guidance_embedder.") for key in tensors),
        "text_embed_dim": shape("context_embedder.proj_in.weight", 2)[1],
        "pooled_projection_dim": shape("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        "rope_theta": 256.0,
        "rope_axes_dim": rope,
        "image_condition_type": None,
    }
    check_stated(stated, original_config(config))
    return config


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The original configuration (hyvideo/modules/models.py) for the fields of diffusers' config.json.

    Raises:
        UserError: Something that the original has only one value of.
    """
    if config["rope_theta"] != 256:
        raise UserError(
            f"rope_theta {config['rope_theta']} has no place in HunyuanVideo's original layout",
            remedy="export to diffusers",
        )
    return {
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "heads_num": config["num_attention_heads"],
        "mlp_width_ratio": config["mlp_ratio"],
        "mm_double_blocks_depth": config["num_layers"],
        "mm_single_blocks_depth": config["num_single_layers"],
        "rope_dim_list": list(config["rope_axes_dim"]),
        "patch_size": [config["patch_size_t"], config["patch_size"], config["patch_size"]],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "guidance_embed": config["guidance_embeds"],
    }
