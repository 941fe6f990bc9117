"""How many operations one forward pass of the video UNet is.

Two for each multiply-add. For P positions at a level of width c (all frames), F frames, T text tokens of width t and
channels i of what comes in, one layer takes

    ResNet                2 P 9 (i + c) c, and 2 P i c where i is not c
    spatial transformer   2 P c c x 20 + 2 T t c x 2; of attention, QK products 2 P (P / F) c + 2 P T c
    motion module         2 P c c x 22; of attention, QK products 2 P F c x 2

and PV products as much as QK products. 20 are two projections, six layers of attention and a feed-forward of 8 + 4; a
motion module has eight layers of attention. The text's keys and values are computed once a video. Convolutions are the
ResNets', those that change the resolution, and the spatial transformers' projections unless these are linear layers.
"""

from collections.abc import Iterator

from models.unet_motion_config import UNetMotionConfig


def unet_operations(
    config: UNetMotionConfig, size: tuple[int, int, int], text_tokens: int
) -> tuple[float, float, float]:
    """Operations of (convolutions, linear layers, QK products) for latents of (frames, height, width).

    The first and last convolution and the layers of the timestep (below 1 %) are left out.
    """
    frames, height, width = size
    convolutions = linear = products = 0.0
    projections = 0 if config.use_linear_projection else 2
    for level, incoming, channels, attends, moves, resamples in _layers(config):
        positions = frames * height * width / 4**level
        square = 2.0 * positions * channels * channels
        convolutions += 2.0 * positions * 9 * (incoming + channels) * channels
        convolutions += 2.0 * positions * incoming * channels * (incoming != channels)
        convolutions += 9 * square * resamples
        linear += 22 * square * moves
        products += 2 * 2.0 * positions * frames * channels * moves
        if attends:
            convolutions += projections * square
            linear += (20 - projections) * square + 2 * 2.0 * text_tokens * config.cross_attention_dim * channels
            products += 2.0 * positions * (positions / frames + text_tokens) * channels
    return convolutions, linear, products


def _layers(config: UNetMotionConfig) -> Iterator[tuple[int, int, int, bool, bool, float]]:
    """(level, channels in, channels, whether it attends to the text, whether it has a motion module, how many positions
    the convolution behind it makes of one) for every layer and both of the middle's ResNets."""
    widths, last = config.block_out_channels, config.levels - 1
    skips = [widths[0]]
    for level, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
        for number in range(config.layers_per_block):
            ends = number == config.layers_per_block - 1 and level < last
            yield level, skips[-1], width, kind.startswith("CrossAttn"), True, ends / 4
            skips += [width] * (1 + ends)
    yield last, widths[-1], widths[-1], True, config.use_motion_mid_block, 0
    yield last, widths[-1], widths[-1], False, False, 0
    before = widths[-1]
    for step, (width, kind) in enumerate(zip(reversed(widths), config.up_block_types, strict=True)):
        for number in range(config.layers_per_block + 1):
            ends = number == config.layers_per_block and step < last
            yield last - step, before + skips.pop(), width, kind.startswith("CrossAttn"), True, ends * 4
            before = width
