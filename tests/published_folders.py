"""Folders as published models have them: tokenizers of a few words, with numbers below 40, and small pipelines."""

import json
import struct
from pathlib import Path

import jax
from small_models import (
    CLIP_TEXT,
    CLIP_VISION,
    COGVIDEOX,
    HUNYUANVIDEO,
    LLAMA,
    T5,
    UMT5,
    UNET,
    UNET_SPATIO_TEMPORAL,
    WAN,
    encoder_folder,
    randomised,
)  # fmt: skip

import models
from models.tokenizer import TextTokenizer
from models.vae_folders import build_vae

WORDS = ("▁a", "▁cat", "▁red", "▁disc", "s", "▁", "c", "a", "t", "r", "e", "d", "i", "!", "fi")
PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
PIECES += [(word, -2.0 - number / 7, 1) for number, word in enumerate(WORDS)]


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + _varint(number >> 7)


def _field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def sentencepiece_bytes(pieces=PIECES, kind: int = 1, character_map: bytes = b"") -> bytes:
    """The bytes of a `spiece.model`; fields that a reader does not know are among them."""
    parts = [_field(1, _field(1, text.encode()) + _field(2, score) + _field(3, k)) for text, score, k in pieces]
    trainer = _field(2, _field(1, b"input.txt") + _field(3, kind) + _field(4, 300))
    normalizer = _field(3, _field(1, b"nmt_nfkc") + _field(2, character_map) + _field(3, 1))
    return b"".join(parts) + trainer + normalizer


def t5_tokenizer(folder: Path) -> Path:
    """As CogVideoX's folders have it: `spiece.model`, and no gaps, so that numbers stay small."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(sentencepiece_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "extra_ids": 0}))
    return folder


def clip_tokenizer(folder: Path, padding: str = "<|endoftext|>") -> Path:
    """As the folders of Stable Diffusion have it: `vocab.json` and `merges.txt`."""
    folder.mkdir(parents=True)
    letters = list("acdeirst!")
    merges = ["c a", "ca t</w>", "r e", "re d</w>", "d i", "s c</w>", "di sc</w>"]
    names = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    names += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {"pad_token": padding, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def fast_tokenizer(source: Path, folder: Path) -> Path:
    """The tokenizer of another folder as Wan's folders have it: `tokenizer.json`."""
    folder.mkdir(parents=True)
    TextTokenizer(source)._tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    return folder


def llama_tokenizer(folder: Path) -> Path:
    """In the layout of HunyuanVideo's, with T5's few words."""
    return fast_tokenizer(t5_tokenizer(folder.with_name(f"{folder.name}-words")), folder)


CLIP = {**CLIP_TEXT, "max_position_embeddings": 77}
ONE_LEVEL = {
    **UNET, "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlockMotion"],
    "up_block_types": ["CrossAttnUpBlockMotion"],
}  # fmt: skip
# Family -> what is sampled, under which name; its text encoder; the maker of its tokenizer.
PIPELINES = {
    "wan": ("transformer", {**WAN, "num_layers": 1}, UMT5, t5_tokenizer),
    "cogvideox": ("transformer", {**COGVIDEOX, "num_layers": 1}, T5, t5_tokenizer),
    "animatediff": ("unet", ONE_LEVEL, CLIP, clip_tokenizer),
    "hunyuanvideo": ("transformer", {**HUNYUANVIDEO, "num_layers": 1, "num_single_layers": 1}, LLAMA, llama_tokenizer),
}
POOLED = {**CLIP, "hidden_size": HUNYUANVIDEO["pooled_projection_dim"], "eos_token_id": 26}  # clip_tokenizer's


WAN_VAE = {
    "_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 5, "dim_mult": [1, 2], "num_res_blocks": 1,
    "temperal_downsample": [True], "latents_mean": [0.1, -0.2, 0.3, 0.0, 1.0],
    "latents_std": [1.5, 2.0, 0.5, 1.0, 3.0],
}  # fmt: skip


def published_pipeline(folder: Path, family: str, vae: dict | None = None) -> Path:
    """A pipeline of random parameters as diffusers saves it, with the autoencoder of a `config.json` or without one."""
    name, config, encoder, tokenizer = PIPELINES[family]
    models.save(randomised(models.abstract(config)), folder / name)
    encoder_folder(folder / "text_encoder", encoder)
    tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "Pipeline", name: ["diffusers", config["_class_name"]],
        "text_encoder": ["transformers", encoder["architectures"][0]], "tokenizer": ["transformers", "Tokenizer"],
        "transformer_2": [None, None], "boundary_ratio": None,
    }  # fmt: skip
    if family == "hunyuanvideo":
        encoder_folder(folder / "text_encoder_2", POOLED)
        clip_tokenizer(folder / "tokenizer_2")
        index["text_encoder_2"] = ["transformers", "CLIPTextModel"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    if vae is not None:
        models.save_vae(randomised(jax.eval_shape(lambda: build_vae(vae))), folder / "vae")
        index["vae"] = ["diffusers", vae["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# Stable Video Diffusion: of the model's 10 channels 5 are the image's; four times the height and width.
PICTURE_MODEL = {
    **UNET_SPATIO_TEMPORAL, "in_channels": 10, "block_out_channels": [32], "num_attention_heads": [2],
    "down_block_types": ["DownBlockSpatioTemporal"], "up_block_types": ["CrossAttnUpBlockSpatioTemporal"],
}  # fmt: skip
PICTURE_VAE = {
    "_class_name": "AutoencoderKLTemporalDecoder", "block_out_channels": [32, 32, 32], "latent_channels": 5,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "layers_per_block": 2,
}  # fmt: skip
PICTURE_ENCODER = {
    **CLIP_VISION, "architectures": ["CLIPVisionModelWithProjection"], "projection_dim": 24, "image_size": 224,
    "patch_size": 56,
}  # fmt: skip
PICTURE_SCHEDULER = {
    "prediction_type": "v_prediction", "timestep_type": "continuous", "timestep_spacing": "leading",
    "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}  # fmt: skip


def picture_pipeline(folder: Path) -> Path:
    """That of a model that follows a picture and no text."""
    models.save(randomised(models.abstract(PICTURE_MODEL)), folder / "unet")
    models.save_vae(randomised(jax.eval_shape(lambda: build_vae(PICTURE_VAE))), folder / "vae")
    encoder_folder(folder / "image_encoder", PICTURE_ENCODER)
    for name, file, content in (
        ("feature_extractor", "preprocessor_config.json", {}),
        ("scheduler", "scheduler_config.json", {"_class_name": "EulerDiscreteScheduler", **PICTURE_SCHEDULER}),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(content))
    index = {
        "_class_name": "StableVideoDiffusionPipeline", "unet": ["diffusers", PICTURE_MODEL["_class_name"]],
        "vae": ["diffusers", PICTURE_VAE["_class_name"]],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
