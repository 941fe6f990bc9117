"""Quantization-aware training."""

from qvdjax.qat.straight_through import FakeQuantizedLinear, fake_quantized

__all__ = ["FakeQuantizedLinear", "fake_quantized"]
