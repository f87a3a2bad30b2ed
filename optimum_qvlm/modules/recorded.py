"""Quantized linears without values, by the record of what one got."""

import torch
from torch import nn

from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.plan import ModuleRecord


def empty_linear(linear: nn.Linear, record: ModuleRecord) -> QuantLinear:
    """What takes the place of `linear` once it is filled, on its device."""
    return QuantLinear(
        record.in_features,
        record.out_features,
        record.format,
        bias=linear.bias is not None,
        scale_dtype=getattr(torch, record.scale_dtype),
        bias_dtype=None if linear.bias is None else linear.bias.dtype,
        device=linear.weight.device,
    )
