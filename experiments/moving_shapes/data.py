"""Training data as a pure function of (seed, step): drawn by rule on the device, or as a grain stream.

    python -m experiments.moving_shapes.data OUT [--count N] [--seed S]

writes a folder of precomputed latents and text embeddings (`experiments/training/latents.py` documents the
format).
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from experiments.moving_shapes.captions import all_captions
from experiments.moving_shapes.clips import fold, render, scene
from experiments.moving_shapes.words import caption_contexts

EPOCH: Final = 2**31 - 1  # grain wants a length; the stream by rule has no other end


def example(seed: jax.Array | int, index: jax.Array | int, frame_factor: int = 1) -> dict[str, jax.Array]:
    """Example number `index` of a seed's endless stream.

    Returns:
        latents float32 (9 / n, 8, 8, 12 n) with n = `frame_factor` frames folded into one, context float32 (8, 64),
        caption int32 () into `all_captions()`.
    """
    key = jax.random.fold_in(jax.random.key(seed), index)
    caption_key, scene_key = jax.random.split(key)
    caption = jax.random.randint(caption_key, (), 0, len(all_captions()))
    return {
        "latents": fold(render(scene(caption, scene_key)), frame_factor),
        "context": jnp.asarray(caption_contexts())[caption],
        "caption": caption,
    }


def batch(seed: jax.Array | int, step: jax.Array | int, size: int, frame_factor: int = 1) -> dict[str, jax.Array]:
    """Examples step * size ... step * size + size - 1 of the stream, stacked. Works inside jit."""
    indices = jnp.asarray(step, jnp.uint32) * size + jnp.arange(size, dtype=jnp.uint32)
    return jax.vmap(lambda index: example(seed, index, frame_factor))(indices)


def stream(seed: int) -> Any:
    """The same stream as a `grain.MapDataset`: element i equals `example(seed, i)`."""
    import grain

    draw = jax.jit(example)

    class Source:
        def __len__(self) -> int:
            return EPOCH

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {name: np.asarray(value) for name, value in draw(seed, index).items()}

    return grain.MapDataset.source(Source())


def main(argv: list[str] | None = None) -> None:
    """Write a data folder."""
    from experiments.training.latents import write_folder

    parser = argparse.ArgumentParser(
        prog="python -m experiments.moving_shapes.data", description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--count", type=int, default=1024, help="clips to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stream")
    parser.add_argument(
        "--frame-factor", type=int, default=1, choices=[1, 3, 9],
        help="frames folded into one frame of latents: 3 for the AnimateDiff",
    )  # fmt: skip
    parser.add_argument("--shard", type=int, default=512, help="clips in a file")
    options = parser.parse_args(argv)

    draw = jax.jit(functools.partial(batch, frame_factor=options.frame_factor), static_argnums=2)
    captions = [str(caption) for caption in all_captions()]

    def examples() -> Any:
        size = 64
        for step in range(-(-options.count // size)):
            drawn = {name: np.asarray(value) for name, value in draw(options.seed, step, size).items()}
            for row in range(min(size, options.count - step * size)):
                yield {"latents": drawn["latents"][row], "context": drawn["context"][row],
                       "prompt": captions[int(drawn["caption"][row])]}  # fmt: skip

    write_folder(options.out, examples(), shard=options.shard)
    print(f"wrote {options.count} clips to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
