"""All VAEs against diffusers' in float64, in each form that they have: one pass, a scan, sections, tiles."""

import functools

import pytest
from vae_parity import COGVIDEOX, HUNYUANVIDEO, IMAGE, TEMPORAL, WAN, vae_errors

SCAN, ONCE = {"options": {"scan": True}}, {"options": {"scan": False}}


def steps(tile: tuple[int, int], stride: tuple[int, int], side: int, **options) -> dict:
    """A call in tiles of so many latents of `side` pixels, where diffusers is told tiles and strides in pixels."""
    pixels = {
        f"tile_sample_{name}_{axis}": sizes[i] * side
        for name, sizes in (("min", tile), ("stride", stride))
        for i, axis in enumerate(("height", "width"))
    }
    return {"tiling": [tile, stride], "theirs": pixels, "options": options}


def overlaps(tile: tuple[int, int], stride: tuple[int, int], side: int) -> dict:
    """The same where diffusers is told the part of a tile that overlaps."""
    theirs = {}
    for i, axis in enumerate(("height", "width")):
        theirs[f"tile_sample_min_{axis}"], theirs[f"tile_latent_min_{axis}"] = tile[i] * side, tile[i]
        theirs[f"tile_overlap_factor_{axis}"] = 1 - stride[i] / tile[i]
    return {"tiling": [tile, stride], "theirs": theirs}


# Frames are not square, no two sizes agree, and chunks, sections and tiles are followed by shorter ones.
FAST = {
    "wan": {
        "config": WAN, "batch": 2, "video": (9, 6, 10), "latents": (4, 3, 5),
        "calls": {"scan": SCAN, "once": ONCE},
    },
    # Ten images in chunks of eight.
    "image": {"config": IMAGE, "batch": 2, "video": (5, 6, 10), "latents": (5, 3, 5), "calls": {"whole": {}}},
    # Chunks of 9 and 8 frames, and of 3 and 2 latent frames.
    "cogvideox": {
        "config": COGVIDEOX, "batch": 2, "video": (17, 6, 10), "latents": (5, 3, 4), "calls": {"whole": {}},
    },
    # Sections of 17 frames, the second of 9, and of 5 latent frames, the second of 3.
    "hunyuanvideo": {
        "config": HUNYUANVIDEO, "batch": 2, "video": (21, 8, 12), "latents": (6, 2, 3), "calls": {"sections": {}},
    },
    "stable video diffusion": {
        "config": TEMPORAL, "batch": 2, "video": (3, 6, 10), "latents": (3, 3, 5), "calls": {"whole": {}},
    },
}  # fmt: skip
SLOW = {
    "wan tiles": {
        "config": WAN, "batch": 2, "video": (9, 6, 10), "latents": (4, 3, 5),
        "calls": {"scan": SCAN, "tiles": steps((2, 4), (1, 3), 2, scan=True)},
    },
    # The published structure, of frames that are halved at the two coarser levels.
    "wan published": {
        "config": {
            **WAN, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "decoder_base_dim": None,
            "scale_factor_temporal": 4, "scale_factor_spatial": 8,
        }, "batch": 1, "video": (9, 16, 24), "latents": (3, 2, 3), "calls": {"scan": SCAN, "once": ONCE},
    },
    "image tiles": {
        "config": {**IMAGE, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
        "batch": 1, "video": (2, 10, 14), "latents": (2, 5, 7),
        "calls": {
            "whole": {},
            "tiles": {"tiling": [[4, 4], [3, 3]], "theirs": {"tile_sample_min_size": 8, "tile_latent_min_size": 4}},
        },
    },
    # An even number of frames, at three levels.
    "cogvideox even": {
        "config": {
            **COGVIDEOX, "block_out_channels": [8, 12, 12], "down_block_types": ["CogVideoXDownBlock3D"] * 3,
            "up_block_types": ["CogVideoXUpBlock3D"] * 3, "temporal_compression_ratio": 4,
        }, "batch": 1, "video": (16, 12, 20), "latents": (4, 3, 5),
        "calls": {"whole": {}, "tiles": overlaps((2, 3), (1, 2), 4)},
    },
    "one frame": {"config": COGVIDEOX, "batch": 1, "video": (1, 6, 4), "latents": (1, 3, 2), "calls": {"whole": {}}},
    # 4 sections, the last of which has no frame of its own.
    "hunyuanvideo tiles": {
        "config": {**HUNYUANVIDEO, "mid_block_add_attention": False}, "batch": 1, "video": (37, 12, 16),
        "latents": (10, 3, 4), "calls": {"sections": {}, "tiles": steps((2, 3), (1, 2), 4)},
    },
}  # fmt: skip
NAMES = [
    pytest.param(name, call, marks=pytest.mark.slow if cases is SLOW else ())
    for cases in (FAST, SLOW)
    for name, case in cases.items()
    for call in case["calls"]
]


@functools.cache
def errors(slow: bool) -> dict[str, float]:
    return vae_errors(SLOW if slow else FAST)


@pytest.mark.parametrize(("name", "call"), NAMES)
def test_parity_with_diffusers(name, call):
    found = {key: error for key, error in errors(name in SLOW).items() if key.startswith(f"{name}: {call}: ")}
    assert len(found) == 3
    # Rounding in float64, of some thousand sums in a row. Where Wan's decoder repeats rows and columns, diffusers does
    # so in float32, which costs 1e-7.
    most = 1e-6 if name.startswith("wan") else 1e-12
    assert max(found.values()) <= most, found
