"""The quantized layers of a folder, read back as floats one block's layer at a time."""

import dataclasses
import math

import numpy as np

import models
from qvdjax.checkpoint import CheckpointFolder, expected_tensors
from qvdjax.nn import QUANTIZED_LAYERS, LayerScheme, layers_of
from qvdjax.nn.conv import QuantizedConv
from qvdjax.numerics import hadamard
from qvdjax.numerics.float8 import as_float8
from qvdjax.numerics.packing import unpack_bits


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """One quantized layer of one block.

    Attributes:
        folder: Where its tensors lie.
        name: Its name in diffusers.
        scheme: What it was quantized to.
        shape: Shape of its float weight.
        convolution: Whether it is a convolution.
    """

    folder: CheckpointFolder
    name: str
    scheme: LayerScheme
    shape: tuple[int, ...]
    convolution: bool

    def tensor(self, part: str) -> np.ndarray | None:
        """One of its tensors ("weight_scale"), None where it has none of that name."""
        key = f"{self.name}.{part}"
        return self.folder.read(key) if key in self.folder.files else None

    @property
    def has_codes(self) -> bool:
        """Whether its weight is quantized, not only its input."""
        return self.scheme.weight is not None

    def codes(self) -> np.ndarray:
        """Signed codes int8 [out, in] (of a convolution [out, in * kernel])."""
        packed = self.tensor("weight_packed")
        if packed is None:
            return self.tensor("weight")
        return unpack_bits(packed, self.scheme.weight.bits, math.prod(self.shape[1:]))

    def weight(self) -> np.ndarray:
        """The float weight [out, in, *kernel] that its codes stand for, with its branch and its estimate added, as one
        without gains, and transforms undone; float32 or wider.
        """
        if not self.has_codes:
            return self._untransformed(self.tensor("weight"))
        codes, scale, zero_point = self.codes(), self.tensor("weight_scale"), self.tensor("weight_zero_point")
        grid = self.scheme.weight.grid
        if grid.floating:
            codes = as_float8(codes)
        elif grid.codebook is not None:
            codes = grid.levels[codes.astype(np.int32) - grid.low]
        if self.scheme.split is not None:  # [out, parts] -> [out, in]: each column has its part's
            widths = np.array(self.scheme.split) * math.prod(self.shape[2:])
            scale, zero_point = (None if a is None else np.repeat(a, widths, axis=-1) for a in (scale, zero_point))
        groups = scale.shape[-1]
        # [out, (groups size)] -> [out, groups, size]
        real = codes.astype(scale.dtype).reshape(len(codes), groups, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever writes it says by name what is not finite
            if zero_point is not None:
                real -= zero_point[..., None]
            real *= scale[..., None]
            real = real.reshape(len(codes), -1)  # [out, groups, size] -> [out, in]
            if self.scheme.low_rank is not None:
                up, down = (self.tensor(f"low_rank.{side}").astype(real.dtype) for side in ("up", "down"))
                real += up @ down
            if self.scheme.estimator is not None:
                up, down = (self.tensor(f"estimator.{side}").astype(real.dtype) for side in ("up", "down"))
                real += up @ down
            return self._untransformed(real).reshape(self.shape)  # -> [out, in, ...]

    def _untransformed(self, weight: np.ndarray) -> np.ndarray:
        """The weight [out, in] that meets the layer's own input instead of the transformed one."""
        rotation, scale = self.scheme.rotation, self.tensor("transform.smooth_scale")
        if self.scheme.kronecker is not None:
            left, right = (self.tensor(f"transform.{side}").astype(weight.dtype) for side in ("left", "right"))
            matrices = weight.reshape(len(weight), len(left), len(right))  # [out, (a b)] -> [out, a, b]
            weight = np.einsum("ia,oab,jb->oij", left, matrices, right, optimize=True).reshape(weight.shape)
        if rotation is not None:
            weight = np.asarray(hadamard.rotate(weight, rotation.block_of(weight.shape[-1]), inverse=True))
            if rotation.signs:
                weight = weight * self.tensor("transform.signs")
        return weight if scale is None else weight / scale  # quantizing multiplied its columns by it


def stored_layers(folder: CheckpointFolder) -> dict[str, StoredLayer]:
    """Name in diffusers -> layer, for every quantized layer and block of a folder.

    Raises:
        UserError: See `models.skeleton`.
    """
    config = {name: value for name, value in folder.config.items() if name != "quantization_config"}
    shapes = {key: tensor.shape for key, tensor in expected_tensors(models.abstract(config)).items()}
    return {
        name: StoredLayer(folder, name, layer.scheme, shapes[f"{name}.weight"], isinstance(layer, QuantizedConv))
        for names, _, layer in layers_of(models.skeleton(folder), QUANTIZED_LAYERS)
        for name in names
    }
