"""One public function an operation, each with a plain-jnp reference and a choice of implementation."""

from qvdjax.kernels.attention import attention_choice, dot_product_attention
from qvdjax.kernels.dispatch import Choice, Device, Implementation, target
from qvdjax.kernels.quantized_attention import quantized_attention, quantized_attention_choice
from qvdjax.kernels.quantized_convolution import quantized_convolution, quantized_convolution_choice
from qvdjax.kernels.quantized_linear import quantized_linear, quantized_linear_choice
from qvdjax.kernels.quantized_matmul import quantized_matmul, quantized_matmul_choice

__all__ = [
    "Choice",
    "Device",
    "Implementation",
    "attention_choice",
    "dot_product_attention",
    "quantized_attention",
    "quantized_attention_choice",
    "quantized_convolution",
    "quantized_convolution_choice",
    "quantized_linear",
    "quantized_linear_choice",
    "quantized_matmul",
    "quantized_matmul_choice",
    "target",
]
