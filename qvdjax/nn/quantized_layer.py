"""What every quantized layer holds."""

import jax
from flax import nnx

from qvdjax.nn.frames import FrameAxis, for_input
from qvdjax.nn.scheme import Execution, LayerScheme, Role
from qvdjax.nn.timestep import TimestepReader
from qvdjax.nn.variables import Codes, Param, Scale, Statistic
from qvdjax.numerics import QTensor


class StaticRanges(TimestepReader):
    """A layer whose input may have ranges that calibration fixed.

    Attributes:
        scheme: A LayerScheme; its `activation` says what ranges are of.
        input_scale, input_zero_point: See `QuantizedLayer`.
        frame_axis: Where frames lie in the input, None for nowhere.
    """

    input_scale: nnx.Variable | None = None
    input_zero_point: nnx.Variable | None = None
    frame_axis: FrameAxis | None = None

    def static_range(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point of a static activation quantizer, broadcastable against an input of that shape."""
        pair = tuple(None if a is None else a[...] for a in (self.input_scale, self.input_zero_point))
        granularity = self.scheme.activation.granularity
        if granularity == "step":
            return tuple(None if a is None else self.of_step(a, shape) for a in pair)
        if granularity == "frame":
            return tuple(None if a is None else for_input(a, self.frame_axis, shape) for a in pair)
        return pair


class QuantizedLayer(StaticRanges):
    """The variables of a quantized layer, and the weight that they stand for.

    Attributes:
        codes: [out, in] integers, or None when the weight stays float.
        weight_scale, weight_zero_point: [out or 1, groups] float32; no zero point when symmetric.
        bias: [out], or None.
        input_scale, input_zero_point: [1, 1] float32 of a static activation quantizer, [frames, 1] of one with a range
            for each frame, [timesteps, 1] of one with a range for each timestep, else None.
            Of a convolution whose input is in parts with ranges of their own, [parts, 1].
        weight_sqnr_db: [] signal-to-quantization-noise ratio of the weight, recorded when quantizing.
        axes: Logical names of the two axes of `codes`.
        frame_axis: Where frames lie in the input, None for nowhere.
    """

    def __init__(
        self, *, weight: QTensor | None, bias: jax.Array | None, role: Role, axes: tuple, scheme: LayerScheme,
        execution: Execution, input_scale=None, input_zero_point=None, weight_sqnr_db=None,
        frame_axis: FrameAxis | None = None,
    ):  # fmt: skip
        if weight is None:
            self.codes = self.weight_scale = self.weight_zero_point = None
        else:
            scale_axes = (axes[0] if scheme.weight.granularity != "tensor" else None, None)
            self.codes = Codes(weight.codes, axes=axes, bits=weight.bits)
            self.weight_scale = Scale(weight.scale, axes=scale_axes)
            self.weight_zero_point = None if weight.zero_point is None else Scale(weight.zero_point, axes=scale_axes)
        shifted = "shift" in scheme.transforms  # then float32 is what the bias needs (`qvdjax.ptq.layers`)
        self.bias = None if bias is None else Param(bias, axes=axes[:1], keep_float32=shifted)
        self.input_scale = None if input_scale is None else Scale(input_scale, axes=(None, None))
        self.input_zero_point = None if input_zero_point is None else Scale(input_zero_point, axes=(None, None))
        self.weight_sqnr_db = None if weight_sqnr_db is None else Statistic(weight_sqnr_db, axes=())
        self.role, self.axes, self.scheme, self.execution = role, axes, scheme, execution
        self.frame_axis = frame_axis

    @property
    def qweight(self) -> QTensor:
        """The weight as a QTensor [out, in]."""
        zero_point = None if self.weight_zero_point is None else self.weight_zero_point[...]
        quantizer = self.scheme.weight
        return QTensor(self.codes[...], self.weight_scale[...], zero_point, quantizer.bits, quantizer.codebook)
