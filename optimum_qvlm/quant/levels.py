"""The choice of scales that are whole multiples of one step per row, see `optimum_qvlm.kernels.levels`."""

import math

import torch
from torch import Tensor

from optimum_qvlm.kernels.levels import LARGEST_MULTIPLE

MULTIPLE_BITS = 4
"""Of the largest multiple: a step leaves as many significant bits of the dtype to it."""

PARTS = tuple(7.75 + number / 4 for number in range(32))
"""Steps that are tried, as parts of the largest scale of a row; half of a step can do whatever the step can."""


def fit_steps(scale: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """The step [rows, 1] of each row, fp32, whose multiples come closest to the scales [rows, groups] wanted.

    What a scale costs that is not the best one grows with the square of its distance from it, times `importance`
    [groups]. Multiples of the steps are exact in `dtype`. A row of zeros gets step 1.
    """
    size = scale.float().abs()
    largest = size.amax(1, keepdim=True)
    weight = torch.ones_like(size[:1]) if importance is None else importance.float()
    best = least = torch.full_like(largest, torch.inf)
    for parts in PARTS:
        step = _exact(largest / parts, dtype)
        error = ((_multiples(size, step) * step - size).square() * weight).sum(1, keepdim=True)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return torch.where(largest > 0, best, torch.ones_like(best))


def to_multiples(scale: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The multiples of `step` that are closest to scales of either sign, in `dtype`; none is zero."""
    nearest = _multiples(scale.float().abs(), step) * step
    return torch.where(scale < 0, -nearest, nearest).to(dtype)


def _multiples(size: Tensor, step: Tensor) -> Tensor:
    return torch.round(size / step).clamp_(1, LARGEST_MULTIPLE)


def _exact(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive fp32 steps rounded to so few bits that all their multiples are exact in `dtype`."""
    limits = torch.finfo(dtype)
    least = max(limits.tiny / 2**MULTIPLE_BITS, torch.finfo(torch.float32).tiny)
    spare = 24 - (1 - round(math.log2(limits.eps)) - MULTIPLE_BITS)
    bits = step.clamp(least, limits.max / 2**MULTIPLE_BITS).view(torch.int32)
    rounded = bits + (1 << (spare - 1)) & -(1 << spare)
    return rounded.view(torch.float32)
