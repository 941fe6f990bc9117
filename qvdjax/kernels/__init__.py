"""One public function an operation, each with a plain-jnp reference and a choice of implementation."""

from qvdjax.kernels.quantized_matmul import quantized_matmul

__all__ = ["quantized_matmul"]
