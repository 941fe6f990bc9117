"""The sampler run over all videos of a request, in batches of one size."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments.sampling.previews import Previews
from experiments.sampling.request import Request
from qvdjax.diffusion import Precise, compile_sampler, initial_noise, sample
from qvdjax.errors import UserError
from qvdjax.nn import Attention, layers_of, with_float_attention
from qvdjax.parallel import partition_spec

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): "reading" in bytes, "compiling" 0 or 1, "sampling" in videos or steps."""


def precise_of(model, steps: tuple[int, int]) -> Precise | None:
    """The same model with attention in full precision, for so many first and last steps."""
    if steps == (0, 0):
        return None
    if not any(layer.scheme.qk_bits or layer.scheme.pv_bits for _, _, layer in layers_of(model, (Attention,))):
        raise UserError(
            "steps with attention in full precision were asked for, and this model's attention is not quantized",
            remedy="leave them out, or quantize it: --set attention_qk_bits=8 --set attention_pv_bits=8",
        )
    return Precise(with_float_attention(model), *steps)


def sample_all(
    model, request: Request, *, how: dict, mesh: Mesh | None, batch: int, step_loop: bool, progress: Progress,
    previews: Previews | None = None,
) -> tuple[np.ndarray, dict, int | None]:  # fmt: skip
    """Sample every video of a request, `batch` at a time.

    Args:
        model: Loaded, on the mesh where there is one.
        request: What is sampled.
        how: Further arguments of the sampler.
        mesh, batch, step_loop: See `sample_folder`.
        progress: Called with ("compiling", 0 or 1, 1) and ("sampling", videos or steps done, in all).
        previews: What shows the videos on the way.

    Returns:
        Latents, float32 (videos, frames, height, width, channels); `batch`, `compile_seconds`, `sampling_seconds` and
        `seconds_per_step`; what the program needs of one device by the compiler's account.
    """
    count = len(request.seeds)
    batch = min(batch, count)
    chunks = [np.arange(start, start + batch).clip(max=count - 1) for start in range(0, count, batch)]
    done, compilation, seconds, latents = 0, None, 0.0, []

    def on_step(step: int, _, clean: jax.Array) -> None:
        progress("sampling", done * request.steps + step, len(chunks) * request.steps)
        if previews is not None and previews.wanted(step):
            middle = clean.shape[1] // 2
            frames = _gathered(clean[:, middle : middle + 1])  # by all hosts; one of them writes
            if jax.process_index() == 0:
                previews.write(step, chunks[done], frames)

    # The last chunk is filled up with its last video: another batch size would be another compilation.
    for done, rows in enumerate(chunks):
        inputs = inputs_of(request, rows, mesh)
        if compilation is None:
            progress("compiling", 0, 1)
            compilation = compile_sampler(model, **inputs, **request.sampling, **how, step_loop=step_loop)
            progress("compiling", 1, 1)
        start = time.perf_counter()
        result = sample(model, **inputs, **request.sampling, **how, on_step=on_step if step_loop else None)
        jax.block_until_ready(result.latents)
        seconds += time.perf_counter() - start
        latents.append(_gathered(result.latents))
        if not step_loop:
            progress("sampling", min((done + 1) * batch, count), count)
    timing = {
        "batch": batch,
        "compile_seconds": compilation.seconds,
        "sampling_seconds": seconds,
        "seconds_per_step": seconds / (len(chunks) * request.steps),
    }
    return np.concatenate(latents)[:count], timing, compilation.bytes_held


def inputs_of(request: Request, rows: np.ndarray, mesh: Mesh | None) -> dict:
    """What the sampler is given for some of the videos, on the devices that compute them."""
    seeds = [request.seeds[row] for row in rows]
    noise = initial_noise(seeds, request.latents_shape)
    negative = None if request.negative_context is None else _placed(request.negative_context[rows], mesh)
    return {
        "context": _placed(request.context[rows], mesh),
        "negative_context": negative,
        "noise": _placed(np.asarray(noise), mesh),
        "seeds": seeds,
        **{name: _placed(array[rows], mesh) for name, array in request.conditions.items()},
    }


def _placed(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """A batch on the first device, or split over the mesh; every host passes all rows."""
    if mesh is None:
        return jax.numpy.asarray(array)
    spec, _ = partition_spec(array.shape[:1], ("batch",), mesh)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def _gathered(latents: jax.Array) -> np.ndarray:
    """All rows on every host, float32."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        latents = multihost_utils.process_allgather(latents, tiled=True)
    return np.asarray(latents, np.float32)
