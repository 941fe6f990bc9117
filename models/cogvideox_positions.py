"""Where CogVideoX's tokens are: fixed tables of sines, and rotary tables that depend on the size of the video.

Read in diffusers 0.42 `models/embeddings.py` (get_3d_sincos_pos_embed, get_3d_rotary_pos_embed) and
`pipelines/cogvideo/pipeline_cogvideox.py` (_prepare_rotary_positional_embeddings).
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from models.cogvideox_config import CogVideoXConfig
from qvdjax.nn.embeddings import axial_rope

PERIOD = 10000.0


def sine_table(config: CogVideoXConfig, grid: tuple[int, int, int], dtype) -> jax.Array:
    """(tokens, width) of a grid of frames, rows and columns: a quarter of the features says when, then three eighths
    in which column, then three eighths in which row."""
    frames, rows, columns = grid
    quarter, spatial = config.width // 4, config.spatial_interpolation_scale
    time = _sines(np.arange(frames) / config.temporal_interpolation_scale, quarter)
    row = _sines(np.arange(rows) / spatial, 3 * quarter // 2)
    column = _sines(np.arange(columns) / spatial, 3 * quarter // 2)
    # Only the small tables are made by NumPy: building a model abstractly shall take no time.
    time, row, column = (jnp.asarray(table, dtype) for table in (time, row, column))
    parts = (
        repeat(time, "f d -> (f h w) d", h=rows, w=columns),
        repeat(column, "w d -> (f h w) d", f=frames, h=rows),
        repeat(row, "h d -> (f h w) d", f=frames, w=columns),
    )
    return jnp.concatenate(parts, axis=-1)


def _sines(positions: np.ndarray, width: int) -> np.ndarray:
    """[n] -> [n, width] in float64: sines, then cosines."""
    half = width // 2
    angles = positions[:, None] * PERIOD ** -(np.arange(half) / half)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def rotary_tables(config: CogVideoXConfig, grid: tuple[int, int, int], text: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (text + video tokens, head_dim / 2) in float64; text tokens are not turned.

    With temporal patches (CogVideoX 1.5) positions count patches. Without, a video of another size than the model's is
    resized to fit into it and centred, so that positions may be fractional.
    """
    frames, rows, columns = grid
    spatial = (rows, columns)
    if config.patch_size_t is None:
        spatial = _resized(spatial, config.grid(config.sample_size)[1:])
    cosines, sines = axial_rope((frames, *spatial), config.rope_widths, theta=PERIOD)
    still = (text, cosines.shape[-1])
    return np.concatenate([np.ones(still), cosines]), np.concatenate([np.zeros(still), sines])


def _resized(grid: tuple[int, int], base: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of rows and columns, the grid scaled into the base grid without a change of its shape."""
    (rows, columns), (most_rows, most_columns) = grid, base
    if rows / columns > most_rows / most_columns:
        sizes = most_rows, round(most_rows / rows * columns)
    else:
        sizes = round(most_columns / columns * rows), most_columns
    starts = (round((most - size) / 2) for most, size in zip(base, sizes, strict=True))
    positions = (
        # From `start` to `(start + size) (n - 1) / n`: upstream's formula also where `start` is not zero.
        np.linspace(start, (start + size) * (count - 1) / count, count)
        for start, size, count in zip(starts, sizes, grid, strict=True)
    )
    return tuple(positions)
