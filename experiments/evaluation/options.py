"""What can be chosen about an evaluation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.sampling.request import Settings
from qvdjax.errors import UserError

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total), in samples."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Keyword arguments of `evaluate` and `evaluate_many`.

    Attributes:
        prompts: Sentences; by default `count` captions of the moving shapes.
        count: Number of prompts where none are given, 8 by default.
        seeds: Every prompt is sampled at each of these. By default prompt i is sampled once, at seed i.
        steps, guidance_scale, solver, sigma_grid, shift, negative_prompt: The reference folder's by default, for all
            models.
        dynamic_guidance: Let the guidance vary over the steps, see `qvdjax.diffusion.guidance_scales`.
        guidance_until: Timestep below which steps are not guided, see `qvdjax.diffusion.guidance.guided_steps`; the
            prediction with the context alone is compared there.
        first_frame_guidance: Let the guidance rise over the frames from this, see `qvdjax.diffusion.guidance_scales`.
        context_file: For folders without a `pipeline.json`, instead of prompts: safetensors with `context`
            and `negative_context` as `qvdjax sample` reads them. There is no video then, only latents.
        frames, height, width: Of the latents; the folder's by default.
        batch: Samples computed at once, all by default.
        thresholds: See `thresholds.THRESHOLDS`; `min_oracle` stands for the three oracle scores.
        execution: Of quantized layers: "integer", "simulate", or None for the best on this device.
        mesh: Devices to use, axis name to size; by default one device.
        command: What to print under "how it was made"; this process's command line by default.
        progress: Called after every batch.
    """

    prompts: Sequence[str] | None = None
    count: int | None = None
    seeds: Sequence[int] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    sigma_grid: str | None = None
    shift: float | None = None
    negative_prompt: str | None = None
    dynamic_guidance: str | None = None
    guidance_until: float = 0.0
    first_frame_guidance: float | None = None
    context_file: Path | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    thresholds: Mapping[str, float | None] | None = None
    execution: str | None = None
    mesh: Mapping[str, int] | None = None
    command: str | None = None
    progress: Progress | None = None

    def __post_init__(self):
        if self.batch is not None and self.batch < 1:
            raise UserError(f"the batch is {self.batch}", remedy="compute at least one sample at once")

    @property
    def settings(self) -> Settings:
        """What is asked for instead of the reference folder's own sampler and sizes."""
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})
