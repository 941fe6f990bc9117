"""Small models with random weights, shared by tests of every storey."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import models
from models.encoders import build_encoder
from models.pipeline import Pipeline
from models.unet_blocks import DownBlock, ResnetBlock, UpBlock
from models.unet_stream import UNetConditioning, UNetStream, per_frame
from qvdjax.checkpoint.loading import tensor_sources
from qvdjax.nn import Conv, Linear, Stack, VideoModel

WAN = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
    "attention_head_dim": 32, "in_channels": 5, "out_channels": 5, "text_dim": 24, "freq_dim": 32, "ffn_dim": 96,
    "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip
# The published one has 36 channels: the latents' 16, four of which frames are given, and 16 of those frames.
WAN_I2V = {**WAN, "in_channels": 9, "image_dim": 20, "added_kv_proj_dim": 64}

COGVIDEOX = {
    "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 32,
    "in_channels": 5, "out_channels": 5, "time_embed_dim": 20, "text_embed_dim": 24, "num_layers": 3,
    "sample_height": 8, "sample_width": 6, "sample_frames": 9, "max_text_seq_length": 7, "dropout": 0.0,
    "freq_shift": 0,
}  # fmt: skip
# What makes the published models of it. Latents are (3, 8, 6), or (4, 8, 6) where a patch has two frames.
_ROTARY = {"use_rotary_positional_embeddings": True}
_TEMPORAL = {**_ROTARY, "patch_size_t": 2, "patch_bias": False, "sample_height": 16, "sample_width": 18}
COGVIDEOX_VARIANTS = {
    "2b": {},
    "5b": _ROTARY,
    "5b-i2v": {**_ROTARY, "use_learned_positional_embeddings": True, "in_channels": 10},
    "1.5-5b": _TEMPORAL,
    "1.5-5b-i2v": {**_TEMPORAL, "in_channels": 10, "ofs_embed_dim": 20},
}

HUNYUANVIDEO = {
    "_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 32,
    "in_channels": 5, "out_channels": 5, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2,
    "mlp_ratio": 3.0, "text_embed_dim": 24, "pooled_projection_dim": 12, "rope_axes_dim": [8, 10, 14],
}  # fmt: skip
UNET = {
    "_class_name": "UNetMotionModel", "in_channels": 5, "out_channels": 5, "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlockMotion", "DownBlockMotion"],
    "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion"], "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 24, "num_attention_heads": 2, "motion_num_attention_heads": 4, "motion_max_seq_length": 5,
    "sample_size": 8, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
}  # fmt: skip

UNET_3D = {
    "_class_name": "UNet3DConditionModel", "in_channels": 5, "out_channels": 5, "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"], "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 24, "attention_head_dim": 4, "sample_size": 8, "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
}  # fmt: skip

UNET_SPATIO_TEMPORAL = {
    "_class_name": "UNetSpatioTemporalConditionModel", "in_channels": 8, "out_channels": 5,
    "block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"], "layers_per_block": 1,
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "cross_attention_dim": 24,
    "num_attention_heads": [2, 4], "num_frames": 3, "sample_size": 8,
}  # fmt: skip


def randomised(model, seed: int = 0):
    """Every parameter drawn anew, so that a zero or one of the initialisation cannot hide a mistake.

    Matrices have standard deviation 1.5 / sqrt(fan-in): large enough that a wrong GELU or epsilon shows.
    """
    random = np.random.default_rng(seed)

    def draw(variable):
        array = variable.get_value()
        own = array.shape[array.ndim - len(variable.get_metadata("axes")) :]
        spread = 1.5 / np.sqrt(np.prod(own[1:])) if len(own) > 1 else 0.5
        return variable.replace(jnp.asarray(spread * random.standard_normal(array.shape), array.dtype))

    return jax.tree.map(draw, model, is_leaf=lambda node: isinstance(node, nnx.Variable))


def wan(seed: int = 0, dtype=jnp.float32, **fields):
    """A Wan model of three blocks with random parameters."""
    return randomised(models.build({**WAN, **fields}, dtype=dtype), seed)


def _latents_and_context(keys, latents: tuple[int, ...], dtype) -> dict:
    """Random latents (batch, frames, height, width, channels) and texts of seven tokens, two timesteps."""
    batch = latents[0]
    return {
        "latents": jax.random.normal(keys[0], latents, dtype),
        "timestep": jnp.linspace(317.0, 999.0, batch, dtype=dtype),
        "context": jax.random.normal(keys[1], (batch, 7, 24), dtype),
    }


def wan_inputs(batch: int = 2, seed: int = 0, dtype=jnp.float32) -> dict:
    """Inputs of that model: three frames, not square, two timesteps."""
    return _latents_and_context(jax.random.split(jax.random.key(seed), 2), (batch, 3, 8, 6, 5), dtype)


def cogvideox(variant: str = "5b", seed: int = 0, dtype=jnp.float32, **fields):
    """A CogVideoX model of three blocks with random parameters."""
    config = {**COGVIDEOX, **COGVIDEOX_VARIANTS[variant], **fields}
    return randomised(models.build(config, dtype=dtype), seed)


def cogvideox_inputs(variant: str = "5b", batch: int = 2, seed: int = 0, dtype=jnp.float32) -> dict:
    """Inputs of that model: not square, two timesteps."""
    frames, channels = 4 if variant.startswith("1.5") else 3, 10 if variant.endswith("i2v") else 5
    return _latents_and_context(jax.random.split(jax.random.key(seed), 2), (batch, frames, 8, 6, channels), dtype)


def hunyuanvideo(seed: int = 0, dtype=jnp.float32, **fields):
    """A HunyuanVideo model of two blocks of each kind with random parameters."""
    return randomised(models.build({**HUNYUANVIDEO, **fields}, dtype=dtype), seed)


def hunyuanvideo_inputs(batch: int = 2, seed: int = 0, dtype=jnp.float32) -> dict:
    """Inputs of that model: three frames, not square, two timesteps, texts of different lengths."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        **_latents_and_context(keys, (batch, 3, 8, 6, 5), dtype),
        "encoder_attention_mask": jnp.arange(7) < 4 + 3 * (jnp.arange(batch)[:, None] % 2),  # 4 tokens, 7, 4, ...
        "pooled_projections": jax.random.normal(keys[2], (batch, 12), dtype),
        "guidance": jnp.full((batch,), 6000.0, dtype),
    }


def unet(seed: int = 0, dtype=jnp.float32, **fields):
    """A video UNet of two levels with random parameters and position tables."""
    return randomised(models.abstract({**UNET, **fields}, dtype=dtype), seed)


def unet_inputs(batch: int = 2, seed: int = 0, dtype=jnp.float32) -> dict:
    """Inputs of that model: three frames, not square, two timesteps."""
    return _latents_and_context(jax.random.split(jax.random.key(seed), 2), (batch, 3, 4, 6, 5), dtype)


def unet_3d(seed: int = 0, dtype=jnp.float32, **fields):
    """ModelScope's video UNet of two levels with random parameters."""
    return randomised(models.abstract({**UNET_3D, **fields}, dtype=dtype), seed)


def unet_spatio_temporal(seed: int = 0, dtype=jnp.float32, **fields):
    """Stable Video Diffusion's UNet of two levels with random parameters."""
    return randomised(models.abstract({**UNET_SPATIO_TEMPORAL, **fields}, dtype=dtype), seed)


def unet_spatio_temporal_inputs(batch: int = 2, seed: int = 0, dtype=jnp.float32) -> dict:
    """Inputs of that model: three frames, not square, two timesteps."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "latents": jax.random.normal(keys[0], (batch, 3, 4, 6, 5), dtype),
        "timestep": jnp.linspace(-1.5, 1.6, batch, dtype=dtype),
        "context": jax.random.normal(keys[1], (batch, 1, 24), dtype),
        "image_latents": jax.random.normal(keys[2], (batch, 1, 4, 6, 3), dtype),
        "added_time_ids": jnp.broadcast_to(jnp.array([6.0, 127.0, 0.02], dtype), (batch, 3)),
    }


class OneBlock(VideoModel):
    """Latents to outputs, by one block."""

    def __init__(self, block: nnx.Module):
        self.stacks = nnx.List([Stack(block, prefix="block")])

    def embed(self, latents, timestep, context):
        return latents, None

    def head(self, stream, conditioning):
        return stream


class ConvThenLinear(nnx.Module):
    """A convolution of every frame, and a layer of positions whose frames lie one after the other."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        shared = {"axes": (None, None)}
        self.conv = Conv(
            5, 6, (3, 3), padding=((1, 1), (1, 1)), role="convolution", frame_axis=0, key=keys[0], **shared
        )
        self.linear = Linear(6, 5, role="feed_forward_in", frame_axis=1, key=keys[1], **shared)

    def __call__(self, x, conditioning):
        inner = self.conv(x.reshape(-1, *x.shape[2:]))  # b f h w c -> (b f) h w c
        return self.linear(inner.reshape(len(x), -1, 6)).reshape(x.shape)  # (b f) h w c -> b (f h w) c -> b f h w c


def growing_latents(timesteps, seed: int = 0, frames: int = 2) -> dict:
    """Inputs of a `OneBlock` of five channels, whose latents are as much larger as their timestep is later."""
    noise = jax.random.normal(jax.random.key(seed), (len(timesteps), frames, 3, 4, 5))
    sizes = jnp.asarray(timesteps)[:, None, None, None, None] / 100
    return {"latents": sizes * noise, "timestep": jnp.asarray(timesteps), "context": jnp.zeros((len(timesteps), 1, 1))}


class ResnetUNet(VideoModel):
    """A UNet of ResNets alone: one layer down, two up, which are of one shape."""

    def __init__(self, width: int = 8, time_dim: int = 12):
        keys = iter(jax.random.split(jax.random.key(0), 8))
        padded = {"kernel": (3, 3), "padding": ((1, 1), (1, 1)), "frame_axis": 0}
        self.conv_in = Conv(5, width, **padded, role="embedder", axes=("embed", None), key=next(keys))
        self.time = Linear(1, time_dim, role="time", axes=("mlp", "embed"), key=next(keys))
        self.conv_out = Conv(width, 5, **padded, role="head", axes=(None, "embed"), key=next(keys))

        def parts(number, channels, parts=None):
            options = {"groups": 2, "epsilon": 1e-5, "parts": parts, "key": next(keys), "dtype": jnp.float32}
            return [("resnets", number, ResnetBlock(channels, width, time_dim, **options))]

        shared = {"resamples": False, "key": next(keys), "dtype": jnp.float32}
        blocks = {
            "down_blocks.0": [DownBlock(parts("0", width), width, **shared)],
            "up_blocks.0": [UpBlock(parts(n, 2 * width, (width, width)), width, **shared) for n in ("0", "1")],
        }
        self.stacks = nnx.List([Stack(one, prefix=name) for name, some in blocks.items() for one in some])

    def embed(self, latents, timestep, context):
        sample = per_frame(self.conv_in, latents)
        return UNetStream(sample, (sample,)), UNetConditioning(self.time(timestep[:, None] / 500), context)

    def head(self, stream, conditioning):
        return per_frame(self.conv_out, stream.sample)


def pipeline(words: tuple[str, ...], text_dim: int, **fields) -> Pipeline:
    """What a folder needs to sample 3 frames of 8 x 8 pixels, with random embeddings [words, text_dim]."""
    usual = {
        "tokens": 8, "frames": 3, "height": 4, "width": 4, "channels": 12, "factor": 2, "solver": "unipc", "shift": 3.0,
        "steps": 3, "guidance_scale": 4.0, "fps": 8.0,
    }  # fmt: skip
    embeddings = np.random.default_rng(0).standard_normal((len(words), text_dim)).astype(np.float32)
    return Pipeline(words=words, embeddings=embeddings, **{**usual, **fields})


# A Wan of the latents and texts that `pipeline` has.
SAMPLED = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 12,
    "out_channels": 12, "text_dim": 8, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2,
}  # fmt: skip


def sampled_folder(path: Path, with_pipeline: Pipeline, **fields) -> Path:
    """A model folder that samples prompts: `SAMPLED`, with other fields where they are given, and a pipeline."""
    models.save(models.build({**SAMPLED, **fields}, key=jax.random.key(0)), path)
    with_pipeline.save(path)
    return path


def wan_with_heavy_text():
    """`wan()` with a few heavy features of the text, undone in the layers that read them: the same function."""
    model = wan()
    heavy = jnp.ones(64).at[jnp.array([3, 17, 40])].set(60.0)
    last = model.condition_embedder.text_embedder["linear_2"]
    last.weight[...], last.bias[...] = last.weight[...] * heavy[:, None], last.bias[...] * heavy
    for layer in (model.stacks[0].block.attn2.to_k, model.stacks[0].block.attn2.to_v):
        layer.weight[...] = layer.weight[...] / heavy
    return model


T5 = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 44,
    "num_layers": 3, "num_heads": 3, "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 20,
}  # fmt: skip
UMT5 = {**T5, "architectures": ["UMT5EncoderModel"], "model_type": "umt5"}
LLAMA = {
    "architectures": ["LlamaModel"], "model_type": "llama", "vocab_size": 40, "hidden_size": 24,
    "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
CLIP_TEXT = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 40, "hidden_size": 24,
    "intermediate_size": 44, "projection_dim": 10, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 9, "eos_token_id": 39, "bos_token_id": 1, "pad_token_id": 39,
}  # fmt: skip
CLIP_VISION = {
    "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 44,
    "projection_dim": 10, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 8, "patch_size": 4,
}  # fmt: skip


def encoder(config: dict, seed: int = 0):
    """An encoder of texts or images with random parameters."""
    return randomised(jax.eval_shape(lambda: build_encoder(config)), seed)


def encoder_folder(folder: Path, config: dict, seed: int = 0) -> Path:
    """The same, written as transformers does."""
    folder.mkdir(parents=True)
    tensors = {source.name: source.make() for source in tensor_sources(encoder(config, seed))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
