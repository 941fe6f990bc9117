"""Which layers see the video's tokens, and how many frames these are: where Q-VDiT's estimates have gains."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qvdjax.calibration.watching import Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Linear, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, replace, shallow_copy


class Measured(Watcher):
    """A linear layer that keeps an array as long as its last input has tokens; for shapes, not to be run.

    Attributes:
        tokens: [tokens].
    """

    def __init__(self, layer: Linear):
        super().__init__(layer)
        self.tokens = Statistic(jnp.zeros((*leading_shape(layer.weight), 0)), axes=(None,))

    def observe(self, x: jax.Array) -> None:
        """x [..., tokens, in]; a vector a sample has as many tokens as there are samples, and no frames."""
        self.tokens = Statistic(jnp.zeros(x.shape[-2] if x.ndim > 2 else 0), axes=(None,))


def tokens_of(model: VideoModel, inputs: Mapping[str, jax.Array]) -> dict[str, int]:
    """How many tokens every linear layer sees in a call, by name in diffusers; nothing is computed."""
    watched = shallow_copy(model)
    for _, path, layer in layers_of(model, (Linear,)):
        replace(watched, path, Measured(layer))
    kept = jax.eval_shape(observe, watched, dict(inputs))
    return {name: found["tokens"].shape[-1] for names, found in by_layer(watched, kept) for name in names}


def with_gains(model: VideoModel, schemes: Mapping[str, Any], inputs: Mapping[str, jax.Array] | None) -> dict[str, Any]:
    """Schemes whose estimators have a gain for each frame, where a layer sees the video's tokens.

    These are all layers that see as many tokens as the stream or as the video has. Others, which see the text alone,
    are left without gains.

    Args:
        model: A float model.
        schemes: One a layer and block, by name in diffusers.
        inputs: Keyword arguments of a call, of the size that the quantized model will be called with; None where a
            calibration set is empty.

    Raises:
        UserError: No inputs; a model that does not say which tokens are a frame's.
    """
    if inputs is None:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    stream, conditioning = jax.eval_shape(lambda model, inputs: model.embed(**inputs), model, dict(inputs))
    frames = model.token_frames(conditioning)
    if frames is None:
        raise UserError(
            "this model does not say which tokens are a frame's", remedy="set gains to none, and temporal to 0"
        )
    tokens = stream.shape[-2]
    video = range(tokens)[model.video_tokens(tokens, conditioning)]
    layouts = {len(video): (0, 0), tokens: (video.start, tokens - video.stop)}
    changed = dict(schemes)
    for name, count in tokens_of(model, inputs).items():
        estimator = getattr(schemes[name], "estimator", None)
        if estimator is not None and count in layouts:
            before, after = layouts[count]
            placed = dataclasses.replace(estimator, frames=frames, before=before, after=after)
            changed[name] = dataclasses.replace(schemes[name], estimator=placed)
    return changed
