"""Parity of a video autoencoder with diffusers' of the same name: folders both ways, and both directions in float64."""

import tempfile

from parity import parity_errors

# Small ones of each kind.
WAN = {
    "_class_name": "AutoencoderKLWan", "base_dim": 6, "z_dim": 5, "dim_mult": [1, 2], "num_res_blocks": 1,
    "temperal_downsample": [True], "decoder_base_dim": 8, "latents_mean": [0.0] * 5, "latents_std": [1.0] * 5,
    "scale_factor_temporal": 2, "scale_factor_spatial": 2,
}  # fmt: skip
IMAGE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 12], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 5, "norm_num_groups": 4,
}  # fmt: skip
COGVIDEOX = {
    "_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [8, 12], "latent_channels": 5,
    "down_block_types": ["CogVideoXDownBlock3D"] * 2, "up_block_types": ["CogVideoXUpBlock3D"] * 2,
    "layers_per_block": 1, "norm_num_groups": 4, "norm_eps": 1e-3, "temporal_compression_ratio": 2,
}  # fmt: skip
HUNYUANVIDEO = {
    "_class_name": "AutoencoderKLHunyuanVideo", "block_out_channels": [8, 8, 12], "latent_channels": 5,
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 3, "up_block_types": ["HunyuanVideoUpBlock3D"] * 3,
    "layers_per_block": 1, "norm_num_groups": 4, "spatial_compression_ratio": 4,
}  # fmt: skip
TEMPORAL = {
    "_class_name": "AutoencoderKLTemporalDecoder", "block_out_channels": [32, 64], "latent_channels": 5,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 2,
}  # fmt: skip

PROGRAM = """
import json, sys
from pathlib import Path
import diffusers, einops, jax, jax.numpy as jnp, numpy as np, torch
import models

def error(ours, theirs):
    assert ours.dtype == jnp.float64 and ours.shape == theirs.shape, (ours.dtype, ours.shape, theirs.shape)
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))

def frames_first(name):
    return name in ("AutoencoderKL", "AutoencoderKLTemporalDecoder")

def to_torch(array, name):
    order = "b f h w c -> (b f) c h w" if frames_first(name) else "b f h w c -> b c f h w"
    return torch.tensor(einops.rearrange(array, order))

def to_numpy(tensor, name, batch):
    order = "(b f) c h w -> b f h w c" if frames_first(name) else "b c f h w -> b f h w c"
    return einops.rearrange(tensor.numpy(), order, **({"b": batch} if frames_first(name) else {}))

torch.manual_seed(0)
random, errors = np.random.default_rng(0), {}
for name, case in json.loads(sys.argv[1]).items():
    config, kind_name = case["config"], case["config"]["_class_name"]
    folder, kind = Path(sys.argv[2], name), getattr(diffusers, kind_name)
    reference = kind(**{k: v for k, v in config.items() if not k.startswith("_")}).double().eval()
    with torch.no_grad():
        for tensor in reference.parameters():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * (1.5 / fan_in**0.5 if fan_in > 1 else 0.5))
    reference.save_pretrained(folder / "theirs")
    vae = models.load_vae(folder / "theirs")
    models.save_vae(vae, folder / "ours")
    weights = kind.from_pretrained(folder / "ours", torch_dtype=torch.float64).state_dict()
    assert weights.keys() == reference.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in reference.state_dict().items())

    video = random.uniform(-1, 1, (case["batch"], *case["video"], vae.config.in_channels))
    latents = random.standard_normal((case["batch"], *case["latents"], vae.config.latent_channels))
    for title, call in case["calls"].items():
        if "tiling" in call:
            reference.enable_tiling()
            for attribute, value in call["theirs"].items():
                assert hasattr(reference, attribute), attribute
                setattr(reference, attribute, value)
        more = {"num_frames": case["latents"][0]} if kind_name == "AutoencoderKLTemporalDecoder" else {}
        with torch.no_grad():
            encoded = reference.encode(to_torch(video, kind_name)).latent_dist
            moments = to_numpy(encoded.parameters, kind_name, case["batch"])
            decoded = to_numpy(reference.decode(to_torch(latents, kind_name), **more).sample, kind_name, case["batch"])
        ours = call.get("options", {})
        if "tiling" in call:
            ours = {**ours, "tiling": models.Tiling(*map(tuple, call["tiling"]))}
        # Compiled within: of tiles, one program a shape.
        posterior = vae.encode(jnp.asarray(video), **ours)
        mean, log_variance = np.split(moments, 2, axis=-1)
        errors[f"{name}: {title}: mean"] = error(posterior.mean, mean)
        errors[f"{name}: {title}: log variance"] = error(posterior.log_variance, np.clip(log_variance, -30, 20))
        errors[f"{name}: {title}: decoded"] = error(vae.decode(jnp.asarray(latents), **ours), decoded)
    # A test of clipped videos alone would hold for wrong ones too.
    assert (abs(decoded) < 1).mean() > 0.3
print(json.dumps(errors))
"""


def vae_errors(cases: dict[str, dict]) -> dict[str, float]:
    """Relative L2 errors "<case>: <call>: mean", "...: log variance" and "...: decoded".

    Folders are compared on the way: every weight survives diffusers -> ours -> diffusers bit for bit.

    Args:
        cases: By name: `config`; `batch`; `video` and `latents`, (frames, height, width) to encode and to decode; and
            `calls` by title: `options` of `encode` and `decode`, and where it is tiled `tiling`, (tile, stride) in
            latents, and `theirs`, diffusers' attributes that say the same. Tiled calls come last.
    """
    with tempfile.TemporaryDirectory() as folder:
        return parity_errors(PROGRAM, cases, folder)
