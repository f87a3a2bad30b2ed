"""Arguments of the product's operation, as a module gives them."""

from typing import Any

from torch import Tensor

from optimum_qvlm.kernels import schema
from optimum_qvlm.modules.qlinear import QuantLinear


def arguments_of(linear: QuantLinear, x: Tensor) -> tuple[Any, ...]:
    """For `torch.ops.optimum_qvlm.linear` on activations `x`."""
    return (
        x,
        linear.weight_packed,
        linear.weight_scale,
        linear.weight_zero_point,
        linear.bias,
        linear.input_equalizer,
        linear.input_scale,
        *schema.parsed(linear.settings)[3],
    )
