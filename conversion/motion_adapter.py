"""A UNet of Stable Diffusion 1.5 and a motion adapter, two folders of diffusers, merged into one video UNet.

As diffusers does it (0.42, `models/unets/unet_motion_model.py`, `UNetMotionModel.from_unet2d`): the names in both files
are those of the whole, so that no weight changes its name or its value.
"""

import dataclasses
from typing import Any

from conversion.source import Source
from models.scheduler import SCHEDULER
from qvdjax.errors import UserError

UNET, ADAPTER, MERGED = "UNet2DConditionModel", "MotionAdapter", "UNetMotionModel"

# Settings of an image UNet that neither the video UNet's configuration nor the names of weights would show.
_ONLY = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "attention_type": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "time_embedding_act_fn": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}
# Of the image UNet's fields those that the video UNet has too; the rest of its fields is the adapter's.
_SHARED = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "downsample_padding",
    "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim",
    "transformer_layers_per_block", "reverse_transformer_layers_per_block", "use_linear_projection", "encoder_hid_dim",
    "encoder_hid_dim_type", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)  # fmt: skip
# diffusers' defaults of an adapter's fields, where an older config.json leaves them out.
_ADAPTER = {
    "block_out_channels": [320, 640, 1280, 1280],
    "motion_layers_per_block": 2,
    "motion_transformer_layers_per_block": 1,
    "motion_mid_block_layers_per_block": 1,
    "motion_transformer_layers_per_mid_block": 1,
    "motion_num_attention_heads": 8,
    "motion_norm_num_groups": 32,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
    "conv_in_channels": None,
}
# diffusers' defaults of what must agree with the adapter, where the image UNet's config.json leaves it out.
_UNET = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "norm_num_groups": 32}


def merge(unet: Source, adapter: Source) -> Source:
    """The video UNet that both make together; its weights are read from where they are.

    The image model's scheduler is left behind: motion modules were trained with other noise levels, which the family's
    defaults have.

    Raises:
        UserError: Either is something else; the adapter is for another width or number of layers, has a kind of
            module that is not here, or its weights lack the mid block that its configuration asks for.
    """
    _expect(unet, UNET, f"give the UNet of Stable Diffusion 1.5 as the source, a folder of diffusers' {UNET}")
    _expect(adapter, ADAPTER, f"give a folder of diffusers' {ADAPTER} with --motion-adapter")
    config = merged_config(unet, adapter)
    _check_mid_block(adapter, wanted=config["use_motion_mid_block"])
    if twice := sorted(set(unet.tensors) & set(adapter.tensors)):
        raise UserError(
            f"{unet.path} and {adapter.path} hold the same keys", remedy="give the image UNet without motion modules",
            items=twice,
        )  # fmt: skip
    if strangers := [key for key in adapter.tensors if ".motion_modules." not in key]:
        raise UserError(
            f"{adapter.path} holds more than motion modules", remedy="give the adapter's weights alone", items=strangers
        )
    return dataclasses.replace(
        unet,
        layout="image UNet and motion adapter",
        config=config,
        config_from=f"config.json of both, {adapter.path} the adapter's",
        tensors={**unet.tensors, **adapter.tensors},
        side_files={name: file for name, file in unet.side_files.items() if name != SCHEDULER},
    )


def refuse_parts(source: Source) -> None:
    """UserError for what is only a part of a video UNet, an image UNet or an adapter."""
    name = source.config.get("_class_name")
    if name == UNET:
        raise UserError(
            f"{source.path} is a UNet of images ({UNET})",
            remedy="give the motion modules that make a video model of it: --motion-adapter FOLDER",
        )
    if name == ADAPTER:
        raise UserError(
            f"{source.path} holds motion modules alone ({ADAPTER})",
            remedy="give the UNet of Stable Diffusion 1.5 as the source, and this with --motion-adapter",
        )


def merged_config(unet: Source, adapter: Source) -> dict[str, Any]:
    """Fields of the video UNet's config.json; raises `UserError` as `merge` does."""
    motion = {name: adapter.config.get(name, default) for name, default in _ADAPTER.items()}
    wrong = [f"{name} {unet.config[name]!r}" for name, only in _ONLY.items() if unet.config.get(name, only) != only]
    if wrong:
        raise UserError(
            f"{unet.path} has settings that a video UNet does not", remedy="use a UNet of Stable Diffusion 1.5",
            items=wrong,
        )  # fmt: skip
    if motion["conv_in_channels"]:
        raise UserError(
            f"{adapter.path} brings its own conv_in of {motion['conv_in_channels']} channels (PIA), which is not here",
            remedy="use an adapter without conv_in_channels",
        )
    if motion["motion_mid_block_layers_per_block"] != 1:
        raise UserError(
            f"{adapter.path} has motion_mid_block_layers_per_block {motion['motion_mid_block_layers_per_block']!r}",
            remedy="use an adapter with 1, as all published ones are",
        )
    for ours, theirs in (
        ("block_out_channels", "block_out_channels"),
        ("layers_per_block", "motion_layers_per_block"),
        ("norm_num_groups", "motion_norm_num_groups"),
    ):
        if (wanted := unet.config.get(ours, _UNET[ours])) != motion[theirs]:
            raise UserError(
                f"the motion adapter {adapter.path} is for another UNet: its {theirs} is {motion[theirs]}, "
                f"the UNet's {ours} {wanted}",
                remedy="use an adapter for Stable Diffusion 1.5 with a UNet of it",
            )
    config = {name: unet.config[name] for name in _SHARED if name in unet.config}
    # Stable Diffusion 1.5 calls the number of heads `attention_head_dim`.
    heads = unet.config.get("num_attention_heads") or unet.config.get("attention_head_dim") or 8
    return {
        "_class_name": MERGED,
        **config,
        "down_block_types": _with_motion(unet, "down_block_types", "DownBlockMotion"),
        "up_block_types": _with_motion(unet, "up_block_types", "UpBlockMotion"),
        "num_attention_heads": heads,
        "motion_num_attention_heads": motion["motion_num_attention_heads"],
        "motion_max_seq_length": motion["motion_max_seq_length"],
        "use_motion_mid_block": motion["use_motion_mid_block"],
        "temporal_transformer_layers_per_block": motion["motion_transformer_layers_per_block"],
        "temporal_transformer_layers_per_mid_block": motion["motion_transformer_layers_per_mid_block"],
    }


def _with_motion(unet: Source, name: str, plain: str) -> list[str]:
    """Kinds of blocks as the video UNet calls them, `plain` and the one that attends to the text."""
    kinds = unet.config.get(name)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f"{unet.path}: config.json has no list {name}", remedy="restore the file")
    return [f"CrossAttn{plain}" if "CrossAttn" in kind else plain for kind in kinds]


def _check_mid_block(adapter: Source, *, wanted: bool) -> None:
    found = any(key.startswith("mid_block.") for key in adapter.tensors)
    if wanted and not found:
        raise UserError(
            f"{adapter.path}: config.json asks for a motion module in the middle (use_motion_mid_block), "
            "and the weights hold none",
            remedy="take the weights of v2, or set use_motion_mid_block to false: v1 and v3 have none",
        )
    if found and not wanted:
        raise UserError(
            f"{adapter.path}: the weights hold a motion module for the middle, and config.json has "
            "use_motion_mid_block false",
            remedy="set use_motion_mid_block to true, as v2 has it, or take the weights of v1 or v3",
        )


def _expect(source: Source, name: str, remedy: str) -> None:
    found = source.config.get("_class_name")
    if found != name:
        raise UserError(f"{source.path} is a {found!r}, not a {name}", remedy=remedy)
