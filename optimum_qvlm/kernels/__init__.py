"""The tensor operations of quantized inference. The torch definition of each is its specification."""

from optimum_qvlm.kernels.reference import (
    dequantize_tokens,
    fake_quantize_tokens,
    quantize_tokens,
    quantized_linear,
)

__all__ = ["dequantize_tokens", "fake_quantize_tokens", "quantize_tokens", "quantized_linear"]
