"""The tensor operations of quantized inference. The torch definition of each is its specification."""

from optimum_qvlm.kernels.ops import quantize
from optimum_qvlm.kernels.reference import (
    dequantize_tokens,
    fake_quantize_static,
    fake_quantize_tokens,
    hadamard,
    quantize_static,
    quantize_tokens,
    quantized_linear,
    round_tokens,
    transform_tokens,
)
from optimum_qvlm.kernels.weights import (
    CHECKPOINT_LAYOUTS,
    NOTHING,
    PACKED,
    TRANSIENT,
    LinearGrid,
    QuantizedWeight,
    Rounding,
    StoredWeight,
)

__all__ = [
    "CHECKPOINT_LAYOUTS",
    "NOTHING",
    "PACKED",
    "TRANSIENT",
    "LinearGrid",
    "QuantizedWeight",
    "Rounding",
    "StoredWeight",
    "dequantize_tokens",
    "fake_quantize_static",
    "fake_quantize_tokens",
    "hadamard",
    "quantize",
    "quantize_static",
    "quantize_tokens",
    "quantized_linear",
    "round_tokens",
    "transform_tokens",
]
