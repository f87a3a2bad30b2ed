"""The tensor operations of quantized inference. The torch definition of each is its specification."""

from optimum_qvlm.kernels.checks import FULL_BITS
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
    CodedWeight,
    Rounding,
    StoredWeight,
    WeightGrid,
)

__all__ = [
    "CHECKPOINT_LAYOUTS",
    "FULL_BITS",
    "NOTHING",
    "PACKED",
    "TRANSIENT",
    "CodedWeight",
    "Rounding",
    "StoredWeight",
    "WeightGrid",
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
