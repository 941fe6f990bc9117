"""Named models at named video sizes, and the work that one forward pass of them is.

The numbers are those of the released checkpoints' config.json. Wan's 480p is 81 frames of 832 x 480 (latents 21 x 60 x
104), its 720p is 81 frames of 1280 x 720; CogVideoX's 480p is 49 frames of 720 x 480 (latents 13 x 60 x 90);
HunyuanVideo's are 129 frames (33 of latents) of Wan's two sizes; AnimateDiff's 512 is 16 frames of 512 x 512.
"""

import dataclasses
import math

import models
from models.unet_config import UNetConfig
from qvdjax.errors import UserError

_WAN = {"_class_name": "WanTransformer3DModel", "attention_head_dim": 128, "text_dim": 4096}
CONFIGS = {
    "wan2.1-t2v-1.3b": {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b": {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "cogvideox-2b": {"_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 30, "num_layers": 30},
    "cogvideox-5b": {
        "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 48, "num_layers": 42,
        "use_rotary_positional_embeddings": True,
    },
    "hunyuanvideo": {"_class_name": "HunyuanVideoTransformer3DModel"},
    # Version 3 of the motion modules around Stable Diffusion 1.5.
    "animatediff": {"_class_name": "UNetMotionModel", "cross_attention_dim": 768, "use_motion_mid_block": False},
    # The size of the shipped bench models: for machines without an accelerator.
    "wan-tiny": {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 32,
        "ffn_dim": 512, "num_layers": 6, "text_dim": 64, "freq_dim": 64,
    },
    "cogvideox-tiny": {
        "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 32,
        "num_layers": 2, "text_embed_dim": 64, "time_embed_dim": 64, "use_rotary_positional_embeddings": True,
        "sample_height": 16, "sample_width": 16, "sample_frames": 33,
    },
    "hunyuanvideo-tiny": {
        "_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 32,
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 64,
        "pooled_projection_dim": 32, "rope_axes_dim": [8, 12, 12],
    },
    "animatediff-tiny": {
        "_class_name": "UNetMotionModel", "block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlockMotion", "DownBlockMotion"], "num_attention_heads": 4,
        "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion"], "cross_attention_dim": 64,
        "use_motion_mid_block": False, "motion_num_attention_heads": 4,
    },
}  # fmt: skip
LATENT_SIZES = {
    "wan": {"480p": (21, 60, 104), "720p": (21, 90, 160), "tiny": (9, 16, 16)},
    "cogvideox": {"480p": (13, 60, 90), "tiny": (9, 16, 16)},
    "hunyuanvideo": {"480p": (33, 60, 104), "720p": (33, 90, 160), "tiny": (9, 16, 16)},
    "animatediff": {"512": (16, 64, 64), "tiny": (9, 16, 16)},
}
"""By the model's family: frames, height and width of latents, the usual size first. Tiny ones are for machines without
an accelerator."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model at a video size.

    Attributes:
        name: As `--shapes` takes it.
        config: Fields of config.json.
        latents: (frames, height, width, channels).
        text_tokens: Length of the context.
    """

    name: str
    config: dict
    latents: tuple[int, int, int, int]
    text_tokens: int

    @property
    def parsed(self):
        """The configuration as its family's class, with that family's defaults."""
        return models.parse_config(self.config)

    @property
    def is_unet(self) -> bool:
        """Whether it is a UNet, whose layers differ in size: those of its first level are timed."""
        return isinstance(self.parsed, UNetConfig)

    @property
    def linear_size(self) -> tuple[int, int, int]:
        """(rows, inputs, outputs) of the first layer of a feed-forward."""
        if self.is_unet:  # gated: twice four times as wide
            width = self.parsed.block_out_channels[0]
            return math.prod(self.latents[:3]), width, 8 * width
        return self.stream_tokens, self.width, self.hidden

    @property
    def attention_size(self) -> tuple[int, int, int, int]:
        """(batch, tokens, heads, head_dim) of a self-attention; a UNet's frames are its batch."""
        if self.is_unet:
            frames, height, width, _ = self.latents
            heads = self.parsed.num_attention_heads
            heads = heads[0] if isinstance(heads, tuple) else heads
            return frames, height * width, heads, self.parsed.block_out_channels[0] // heads
        return 1, self.stream_tokens, self.heads, self.head_dim

    @property
    def stream_tokens(self) -> int:
        """Tokens that attend to each other: the video's, and the text's where they are one stream."""
        return self.tokens + (self.text_tokens if self.joint else 0)

    @property
    def joint(self) -> bool:
        """Whether text and video are one stream, and attention has no second, crossed one."""
        return models.family_of(self.config).name in ("cogvideox", "hunyuanvideo")

    @property
    def tokens(self) -> int:
        """Video tokens: latent positions over those of a patch."""
        return math.prod(self.latents[:3]) // math.prod(self.parsed.patch)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.parsed.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.parsed.attention_head_dim

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Features inside the feed-forward."""
        return self.parsed.ffn_dim

    @property
    def layers(self) -> int:
        """Blocks; a dual-stream and a single-stream one of HunyuanVideo are the same work."""
        return self.parsed.num_layers + getattr(self.parsed, "num_single_layers", 0)


def shape(name: str) -> Shape:
    """A shape by name; UserError lists the known ones."""
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}", remedy=f"choose from {', '.join(SHAPES)}")
    return SHAPES[name]


def _named(name: str, model: str, size: str, text_tokens: int) -> Shape:
    config, family = CONFIGS[model], models.family_of(CONFIGS[model]).name
    return Shape(name, config, (*LATENT_SIZES[family][size], models.parse_config(config).in_channels), text_tokens)


TINY = ("tiny", "tiny-cogvideox", "tiny-hunyuanvideo", "tiny-animatediff")
"""Of all families, for machines without an accelerator."""
DEFAULT = ("wan2.1-1.3b-480p", "wan2.1-14b-480p")

SHAPES = {
    s.name: s
    for s in (
        _named("tiny", "wan-tiny", "tiny", 16),
        _named("tiny-cogvideox", "cogvideox-tiny", "tiny", 16),
        _named("tiny-hunyuanvideo", "hunyuanvideo-tiny", "tiny", 16),
        _named("tiny-animatediff", "animatediff-tiny", "tiny", 16),
        _named("wan2.1-1.3b-480p", "wan2.1-t2v-1.3b", "480p", 512),
        _named("wan2.1-14b-480p", "wan2.1-t2v-14b", "480p", 512),
        _named("wan2.1-1.3b-720p", "wan2.1-t2v-1.3b", "720p", 512),
        _named("wan2.1-14b-720p", "wan2.1-t2v-14b", "720p", 512),
        _named("cogvideox-2b-480p", "cogvideox-2b", "480p", 226),
        _named("cogvideox-5b-480p", "cogvideox-5b", "480p", 226),
        _named("hunyuanvideo-720p", "hunyuanvideo", "720p", 256),
        _named("animatediff-512", "animatediff", "512", 77),
    )
}
