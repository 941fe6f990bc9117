"""Pictures of what is being sampled, while it is."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.sampling.decoding import Decoder
from experiments.sampling.output import enlargement
from qvdjax.video import write_png


@dataclasses.dataclass(frozen=True)
class Previews:
    """After every so many steps, what the model takes the finished videos to be: their middle frames, as pictures.

    Latents on the way are mostly noise; what a step's prediction says the finished ones are is blurred at first.
    A frame of latents is decoded by itself, as a video of one.

    Attributes:
        every: Steps between two.
        decoder: Of single frames.
        paths: Of all videos; a picture after step 5 of `clip.mp4` is `clip-step-05.png`.
        steps: In all. After the last there is the video itself.
        scale: See `sample_folder`.
    """

    every: int
    decoder: Decoder
    paths: Sequence[Path]
    steps: int
    scale: int | None = None

    def wanted(self, step: int) -> bool:
        """Whether there is a picture after so many steps."""
        return step % self.every == 0 and step < self.steps

    def held_bytes(self, peak: int | None, model: int) -> int | None:
        """What sampling needs of a device with the VAE beside the model, weights too, by the compiler's account.

        Args:
            peak: What the program that samples needs, None where the backend does not say.
            model: Bytes of the model's weights.
        """
        if self.decoder.memory is None:
            return peak
        own, frame = self.decoder.memory["weight_bytes"], self.decoder.memory["peak_bytes"]
        return None if peak is None or frame is None else max(peak + own, frame + model)

    def write(self, step: int, rows: Sequence[int], frames: np.ndarray) -> None:
        """Write the pictures of some videos.

        Args:
            step: Steps that are done.
            rows: Numbers of the videos; one may stand there several times, and is written once.
            frames: A frame of each one's latents, (videos, 1, height, width, channels).
        """
        for row, latents in dict(zip(rows, frames, strict=True)).items():
            picture = self.decoder.decode(latents)[0]  # 1 h w rgb -> h w rgb
            scale = enlargement(picture.shape[:2]) if self.scale is None else self.scale
            path = self.paths[row]
            digits = len(str(self.steps))
            write_png(path.with_name(f"{path.stem}-step-{step:0{digits}}.png"), picture, scale=scale)
