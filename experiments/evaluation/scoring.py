"""The oracle's scores, where there is an oracle: on videos of the moving shapes."""

import numpy as np

from experiments.evaluation.setup import Setup
from qvdjax.errors import UserError

ORACLE_SCORES = ("color", "shape", "direction")


NO_DECODER = "the folder has no pipeline.json, so its latents are not decoded"


def why_no_oracle(setup: Setup) -> str | None:
    """Why the oracle cannot judge these samples, or None if it can."""
    from experiments.moving_shapes.captions import Caption
    from experiments.moving_shapes.clips import FRAMES, SIZE

    if setup.pipeline is None:
        return NO_DECODER
    latents = np.zeros((1, *setup.latents_shape), np.float32)
    video_shape = setup.pipeline.decode(latents).shape[1:]  # (frames, height, width, 3)
    if tuple(video_shape) != (FRAMES, SIZE, SIZE, 3):
        sizes = " x ".join(map(str, video_shape[:3]))
        return f"the oracle measures moving shapes of {FRAMES} x {SIZE} x {SIZE}, these videos are {sizes}"
    for prompt in setup.prompts:
        try:
            Caption.parse(prompt)
        except UserError:
            return f"the prompt {prompt!r} is not a caption of the moving shapes"
    return None


def oracle_scores(setup: Setup, videos: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each video shows what its prompt says: {color, shape, direction: 0. or 1. (samples,)}.

    Args:
        videos: (samples, frames, height, width, 3) in [0, 1].
    """
    from experiments.moving_shapes.captions import Caption
    from experiments.moving_shapes.oracle import score

    rows = [score(video, Caption.parse(prompt)) for prompt, video in zip(setup.prompt_texts, videos, strict=True)]
    return {name: np.array([row[name] for row in rows]) for name in ORACLE_SCORES}
