"""Named models at named video sizes, and the work that one forward pass of them is.

Wan's numbers are those of the released checkpoints' config.json; 480p is 81 frames of 832 x 480 (latents 21 x
60 x 104), 720p is 81 frames of 1280 x 720.
"""

import dataclasses
import math

from qvdjax.errors import UserError

_WAN = {"_class_name": "WanTransformer3DModel", "attention_head_dim": 128, "text_dim": 4096}
CONFIGS = {
    "wan2.1-t2v-1.3b": {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b": {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    # The size of the shipped bench models: for machines without an accelerator.
    "wan-tiny": {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 32,
        "ffn_dim": 512, "num_layers": 6, "text_dim": 64, "freq_dim": 64,
    },
}  # fmt: skip
LATENT_SIZES = {"480p": (21, 60, 104), "720p": (21, 90, 160), "tiny": (9, 16, 16)}  # frames, height, width


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
    def tokens(self) -> int:
        """Video tokens: latent positions over the patch of 1 x 2 x 2."""
        return math.prod(self.latents[:3]) // 4

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.config["num_attention_heads"]

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.config["attention_head_dim"]

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Features inside the feed-forward."""
        return self.config["ffn_dim"]

    @property
    def layers(self) -> int:
        """Blocks."""
        return self.config["num_layers"]


def shape(name: str) -> Shape:
    """A shape by name; UserError lists the known ones."""
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}", remedy=f"choose from {', '.join(SHAPES)}")
    return SHAPES[name]


def _named(name: str, model: str, size: str, text_tokens: int) -> Shape:
    config = CONFIGS[model]
    return Shape(name, config, (*LATENT_SIZES[size], config.get("in_channels", 16)), text_tokens)


SHAPES = {
    s.name: s
    for s in (
        _named("tiny", "wan-tiny", "tiny", 16),
        _named("wan2.1-1.3b-480p", "wan2.1-t2v-1.3b", "480p", 512),
        _named("wan2.1-14b-480p", "wan2.1-t2v-14b", "480p", 512),
    )
}
