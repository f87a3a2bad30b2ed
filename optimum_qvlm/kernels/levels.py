"""Scales on two levels: those of a row are whole multiples of one step.

A code of up to four bits times such a multiple is a whole number of eight bits, so a product with integer activations
is one with an int8 weight that has one scale per row.
"""

import torch
from torch import Tensor

from optimum_qvlm.errors import SpecError

LARGEST_MULTIPLE = 15
"""Of the step; 16 times the lowest code of four bits, of either sign, would not fit a byte."""


def common_step(scale: Tensor) -> Tensor:
    """The largest step [rows] of which all scales [rows, groups] are multiples, in their dtype, which holds it exactly.

    Raises:
        SpecError: a row has no such step, or one of which a scale is more than the largest multiple.
    """
    size = scale.double().abs()
    least = size.amin(1, keepdim=True)
    step = torch.zeros_like(least)
    for parts in range(LARGEST_MULTIPLE, 0, -1):
        multiples = torch.round(size * parts / least)
        exact = (multiples * least == size * parts) & (multiples <= LARGEST_MULTIPLE)
        step = torch.where(exact.all(1, keepdim=True), least / parts, step)
    missing = (step == 0).nonzero()
    if len(missing) > 0:
        raise SpecError(
            f"scales of row {int(missing[0, 0])} are not multiples of one step, from 1 to {LARGEST_MULTIPLE}, as "
            "two-level scales are; the checkpoint is damaged, or was written for other scales"
        )
    stored: Tensor = step.squeeze(1).to(scale.dtype)
    return stored
