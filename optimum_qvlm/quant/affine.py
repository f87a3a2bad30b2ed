"""Rounding of weights: scales, zero points, codes."""

import torch
from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import QuantizedWeight
from optimum_qvlm.kernels.reference import dequantize_rows
from optimum_qvlm.quant.levels import fit_steps, to_multiples
from optimum_qvlm.spec import WeightSpec

__all__ = ["QuantizedWeight", "dequantize_weight", "quantize_weight", "split_groups"]


def quantize_weight(
    weight: Tensor,
    spec: WeightSpec,
    *,
    clip: Tensor | float = 1.0,
    scale_dtype: torch.dtype | None = None,
    signed: bool = False,
    step: Tensor | None = None,
) -> QuantizedWeight:
    """Round to nearest on the grid of `spec`.

    Args:
        weight: [out_features, in_features].
        spec: the grid.
        clip: ratio of the range that the grid covers, a number or one per row and group
            [out_features, groups]. Values outside saturate.
        scale_dtype: dtype in which scales are stored, by default the weight's. Scales are rounded to it
            before the codes are chosen, so a stored weight reloads to the same values.
        signed: symmetric scales take the sign that puts the value of largest magnitude on the negative side, which has
            one step more, and at `clip` 1 on the lowest code itself.
        step: fp32 [out_features, 1] of `fit_steps`: symmetric scales become the closest multiples of it. Where it is
            missing, and the grid's scales are on two levels, it is fitted to them.

    A symmetric scale is `clip * peak / (2^bits - 1) * 2`, as in compressed-tensors, and with `signed`
    `-clip * value / 2^(bits - 1)`, where `value` is that of largest magnitude. A group of zeros gets scale 1, or the
    step of its row.

    Raises:
        SpecError: the group does not divide the input channels.
    """
    grouped = split_groups(weight, spec).float()
    ratio = clip.unsqueeze(-1).float() if isinstance(clip, Tensor) else clip
    low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    top, bottom = grouped.amax(dim=-1, keepdim=True), grouped.amin(dim=-1, keepdim=True)
    signed, turned = signed and spec.symmetric, top > -bottom
    if spec.symmetric:
        width = 2 * torch.maximum(top, -bottom) * ratio
    else:
        bottom = bottom.clamp(max=0) * ratio
        width = top.clamp(min=0) * ratio - bottom
    steps_across = width.new_full((), -2.0 * low if signed else float(high - low))  # divides alike on every device
    scale, dtype = width / steps_across, scale_dtype or weight.dtype
    if step is None and spec.two_level:
        step = fit_steps(scale.squeeze(-1), dtype)
    scale = _stored(scale, dtype) if step is None else to_multiples(scale, step.unsqueeze(-1), dtype)
    if signed:
        scale = torch.where(turned, -scale, scale)
    steps = grouped / scale.float()
    zero = None if spec.symmetric else torch.round(low - bottom / scale.float()).clamp_(low, high)
    if zero is not None:
        steps = torch.round(steps) + zero
    codes = torch.round(steps).clamp_(low, high).to(torch.int8).reshape(weight.shape)
    return QuantizedWeight(codes, scale.squeeze(-1), None if zero is None else zero.to(torch.int8).squeeze(-1))


def dequantize_weight(quantized: QuantizedWeight) -> Tensor:
    """fp32 weight [out_features, in_features]."""
    return dequantize_rows(quantized, 0, quantized.codes.shape[0])


def split_groups(weight: Tensor, spec: WeightSpec) -> Tensor:
    """View [out_features, groups, channels of a group]."""
    rows, columns = weight.shape
    if spec.group is not None and columns % spec.group != 0:
        raise SpecError(f"group={spec.group} does not divide in_features={columns}")
    groups = spec.groups(columns)
    return weight.reshape(rows, groups, columns // groups)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in the stored dtype; zeros, and what underflows there, become 1 or the smallest normal."""
    tiny = torch.finfo(dtype).tiny
    rounded = scale.clamp(min=tiny, max=torch.finfo(dtype).max).to(dtype)
    return torch.where(scale > 0, rounded, torch.ones_like(rounded))
