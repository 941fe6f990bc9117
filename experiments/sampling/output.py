"""Where videos go: names, checks before the work starts, and the JSON file beside each."""

import collections
import json
import os
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.sampling.decoding import Decoder
from experiments.sampling.request import Request
from models.pipeline import FILE
from qvdjax.checkpoint.atomic import new_file
from qvdjax.checkpoint.safetensors_file import TensorSource, write_file
from qvdjax.errors import UserError
from qvdjax.video import write_mp4

VIDEO, LATENTS = ".mp4", ".safetensors"
LONGEST_NAME = 250  # bytes of a file's name; .partial is added while it is written
WATCHABLE = 288  # pixels of the short side that enlarging aims at


def check_output(output: Path, *, decodes: bool) -> None:
    """Refuse a target that cannot be written, before a model is loaded.

    Raises:
        UserError: The folder is missing or not writable; the suffix is unknown; a video is asked for where
            nothing decodes latents.
    """
    if output.suffix not in (VIDEO, LATENTS):
        raise UserError(f"{output} is neither {VIDEO} nor {LATENTS}", remedy=f"name a file ending in {VIDEO}")
    if output.suffix == VIDEO and not decodes:
        raise UserError(
            f"the model folder has no {FILE}, so nothing here can decode its latents to {output}",
            remedy=f"name the folder of its whole pipeline, with its VAE, or an output ending in {LATENTS}",
        )
    if not output.parent.is_dir():
        raise UserError(f"the folder {output.parent} does not exist", remedy="make it, or choose another output")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"{output} cannot be written", remedy="choose a file in a folder that can be written")


def output_paths(output: Path, request: Request, names: Literal["prompt", "vbench"] = "prompt") -> list[Path]:
    """`output` for a single video, `<stem>-<name of the text>-<seed><suffix>` beside it for several.

    With `names` "vbench" they are `<prompt>-<number>.mp4` beside it, numbers from 0 for each prompt, as in
    Vchitect/VBench `prompts/README.md`. Raises `UserError` for a prompt that is no name of a file.
    """
    if names == "vbench":
        return _vbench_paths(output, request)
    if len(request.seeds) == 1:
        return [output]
    pairs = zip(request.names, request.seeds, strict=True)
    return [output.with_name(f"{output.stem}-{name}-{seed}{output.suffix}") for name, seed in pairs]


def _vbench_paths(output: Path, request: Request) -> list[Path]:
    counts: collections.Counter[str] = collections.Counter()
    paths, wrong = [], []
    for prompt in request.prompts:
        name = f"{prompt}-{counts[prompt]}{output.suffix}"
        counts[prompt] += 1
        paths.append(output.with_name(name) if prompt and Path(name).name == name else output)
        if paths[-1] == output or len(name.encode()) > LONGEST_NAME:
            wrong.append(repr(prompt))
    if wrong:
        raise UserError(
            "some prompts cannot be names of files, as VBench wants them", remedy="leave out --names vbench",
            items=list(dict.fromkeys(wrong)),
        )  # fmt: skip
    return paths


def enlargement(shape: tuple[int, int]) -> int:
    """By how much a video of (height, width) pixels is enlarged to be watchable; 1 for an ordinary one."""
    return max(1, round(WATCHABLE / min(shape)))


def write_video(
    path: Path,
    request: Request,
    row: int,
    latents: np.ndarray,
    shared: dict,
    decoder: Decoder | None,
    *,
    fps: float | None,
    scale: int | None,
) -> dict:
    """Write video `row` of a request, and the JSON file of the same name.

    Args:
        path: An mp4 file, or safetensors for the latents themselves.
        latents: (frames, height, width, channels).
        shared: What the JSON files of all videos say.
        decoder: What makes a video of them; not needed for latents.
        fps, scale: See `sample_folder`.

    Returns:
        What the JSON file says. Raises `UserError` if a file cannot be written.
    """
    record = {"file": str(path), "prompt": request.prompts[row], "seed": request.seeds[row]}
    if path.suffix == LATENTS:
        write_latents(path, latents)
    else:
        video = decoder.decode(latents)
        frames, height, width, _ = video.shape
        fps = decoder.fps if fps is None else fps
        scale = enlargement((height, width)) if scale is None else scale
        write_mp4(path, video, fps=fps, scale=scale)
        record |= {"frames": frames, "height": height, "width": width, "scale": scale, "fps": fps}
    record |= shared
    write_json(path.with_suffix(".json"), record)
    return record


def write_latents(path: Path, latents: np.ndarray) -> None:
    """Write the latents of one video, (frames, height, width, channels), as tensor `latents`, float32.

    Raises `UserError` if the file cannot be written.
    """
    latents = np.asarray(latents, np.float32)
    write_file(path, [TensorSource("latents", latents.shape, latents.dtype, lambda: latents)])


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that appears complete or not at all. Raises `UserError` if it cannot be written."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
