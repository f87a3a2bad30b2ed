"""Soft assignment of activations to integer levels, and the entropies taken over it (equations 4 and 5 of the paper).

Entropies are in nats.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Softness = Literal["step_squared", "step"]

SOFTNESS: tuple[Softness, ...] = ("step_squared", "step")
"""What squared distances are divided by. The square of the grid's step makes the assignment independent of units; the
step itself is what the paper prints."""

ELEMENTS_AT_ONCE = 65536


@dataclass(frozen=True, slots=True)
class Positions:
    """Activations on a symmetric grid of `bits`: where they lie, in steps, and how long a step is.

    Attributes:
        values: fp32, x / step, any shape.
        steps: fp32, in the units of x, of a shape that broadcasts to `values`.
        bits: the levels are the integers -(2^(bits-1)-1) .. 2^(bits-1)-1.
    """

    values: Tensor
    steps: Tensor
    bits: int

    def columns(self, chosen: Tensor) -> "Positions":
        """Only some of the channels (last dimension)."""
        return Positions(self.values[..., chosen], self.steps.expand_as(self.values)[..., chosen], self.bits)


def grid_positions(x: Tensor, bits: int, group: int | None = None, *, static: bool = False) -> Positions:
    """Place activations [tokens, channels] on the grid that covers their peak.

    The peak is taken per token, or per token and `group` of channels; with `static` over all of `x`. Where the peak is
    zero the step is 1, so everything lies on the level zero.
    """
    x = x.float()
    grouped = x.reshape(x.shape[0], -1, x.shape[1] if group is None else group)
    peak = grouped.abs().amax() if static else grouped.abs().amax(dim=-1, keepdim=True)
    step = peak / (2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, torch.ones_like(step)).expand(*grouped.shape[:2], 1)
    values = (grouped / step).reshape(x.shape)
    return Positions(values, step.expand_as(grouped).reshape(x.shape), bits)


def soft_assignment(positions: Positions, softness: Softness = "step_squared") -> Tensor:
    """Probabilities [elements, levels] of equation 5: the softmax over levels of -(x - q)^2 / D^2, or / D."""
    top = 2 ** (positions.bits - 1) - 1
    levels = torch.arange(-top, top + 1, device=positions.values.device, dtype=torch.float32)
    distance = (positions.values.reshape(-1, 1) - levels).square()  # in steps: (x - q)^2 / D^2
    if softness == "step":
        distance = distance * positions.steps.expand_as(positions.values).reshape(-1, 1)
    return torch.softmax(-distance, dim=-1)


def joint_table(first: Positions, second: Positions, softness: Softness = "step_squared") -> Tensor:
    """P(m, n), fp64 [levels, levels]: the mean over elements of the product of both assignments.

    `first` and `second` hold the same elements of two consecutive activations.
    """
    count = first.values.numel()
    total = torch.zeros(2**first.bits - 1, 2**second.bits - 1, dtype=torch.float64, device="cpu")
    for start in range(0, count, ELEMENTS_AT_ONCE):
        p, q = (soft_assignment(_slice(side, start), softness) for side in (first, second))
        total += (p.T @ q).double().cpu()
    return total / count


def conditional_entropy(table: Tensor) -> float:
    """H(second | first) = -sum P(m, n) log(P(m, n) / P(m)) of a joint table [first, second]."""
    margin = table.sum(dim=1, keepdim=True)
    return max(float(torch.xlogy(margin, margin).sum() - torch.xlogy(table, table).sum()), 0.0)


def marginal_entropy(positions: Positions, softness: Softness = "step_squared") -> float:
    """H of one activation, the upper bound of its conditional entropy."""
    total = torch.zeros(2**positions.bits - 1, dtype=torch.float64, device="cpu")
    count = positions.values.numel()
    for start in range(0, count, ELEMENTS_AT_ONCE):
        total += soft_assignment(_slice(positions, start), softness).sum(dim=0).double().cpu()
    total = total / count
    return max(-float(torch.xlogy(total, total).sum()), 0.0)


def _slice(positions: Positions, start: int) -> Positions:
    """Some of the elements, in order."""
    chosen = slice(start, start + ELEMENTS_AT_ONCE)
    steps = positions.steps.expand_as(positions.values)
    return Positions(positions.values.reshape(-1)[chosen], steps.reshape(-1)[chosen], positions.bits)
