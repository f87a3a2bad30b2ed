"""Quantized linears without values, by the record of what one got."""

import torch
from torch import nn

from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.plan import ModuleRecord


def recorded_linear(
    record: ModuleRecord, *, bias_dtype: torch.dtype | None = None, device: torch.device | str = "meta"
) -> QuantLinear:
    """A linear of that record with tensors to be filled. Without `bias_dtype` it has no bias."""
    return QuantLinear(
        record.in_features,
        record.out_features,
        record.format,
        bias=bias_dtype is not None,
        scale_dtype=getattr(torch, record.scale_dtype),
        bias_dtype=bias_dtype,
        device=device,
    )


def empty_linear(linear: nn.Linear, record: ModuleRecord) -> QuantLinear:
    """What takes the place of `linear` once it is filled, on its device."""
    bias_dtype = None if linear.bias is None else linear.bias.dtype
    return recorded_linear(record, bias_dtype=bias_dtype, device=linear.weight.device)
