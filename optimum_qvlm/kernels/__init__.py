"""The tensor operations of quantized inference. The torch definition of each is its specification."""

from optimum_qvlm.kernels.reference import (
    dequantize_tokens,
    fake_quantize_static,
    fake_quantize_tokens,
    hadamard,
    quantize_static,
    quantize_tokens,
    quantized_linear,
    transform_tokens,
)

__all__ = [
    "dequantize_tokens",
    "fake_quantize_static",
    "fake_quantize_tokens",
    "hadamard",
    "quantize_static",
    "quantize_tokens",
    "quantized_linear",
    "transform_tokens",
]
