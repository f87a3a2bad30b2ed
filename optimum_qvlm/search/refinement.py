"""Descent behind error feedback: scales and codes of a rounded weight, moved in turn to where the error is least.

Error feedback decides every channel once, knowing only those before it. Here each scale and each code is decided again
with all others known, by coordinate descent on the same error, so that no step can raise it.
"""

import torch
from torch import Tensor

from optimum_qvlm.kernels.recursion import descend
from optimum_qvlm.quant.affine import QuantizedWeight, nearest_scale
from optimum_qvlm.quant.levels import to_multiples
from optimum_qvlm.spec import WeightSpec

BLOCK = 128
"""Channels that are decided one by one; what follows from them for all others is computed once per block."""


def refined(
    target: Tensor,
    hessian: Tensor,
    start: QuantizedWeight,
    spec: WeightSpec,
    *,
    sweeps: int,
    step: Tensor | None = None,
) -> QuantizedWeight:
    """Codes and scales of less error `d H d^T` in every row, with `d` the rounded weight less the target, or `start`.

    Zero points and signs of scales stay. Each scale is rounded to the dtype in which it is stored before it is judged.

    Args:
        target: fp32 [out, in], what would be best without rounding.
        hessian: fp32 [in, in], positive on its diagonal.
        start: where the descent starts.
        spec: the grid.
        sweeps: times that all scales and codes are gone through, group by group.
        step: fp32 [out, 1], of which scales stay multiples; None where they may be any.
    """
    descent = _Descent(target, hessian, start, spec, step)
    before = descent.errors()
    for _ in range(sweeps):
        descent.sweep()
    return descent.result(start, better=descent.errors() < before)


class _Descent:
    """The state between steps, transposed: channels and groups first, rows last.

    `codes` are fp32 without zero point, `slope` is the Hessian times what is missing: half the negative gradient.
    """

    def __init__(
        self, target: Tensor, hessian: Tensor, start: QuantizedWeight, spec: WeightSpec, step: Tensor | None
    ) -> None:
        self.hessian, self.spec, self.stored = hessian, spec, start.scale.dtype
        self.step = None if step is None else step.squeeze(1)
        self.width = target.shape[1] // start.scale.shape[1]
        self.scale = start.scale.float().T.clone(memory_format=torch.contiguous_format)
        zero = torch.zeros_like(self.scale) if start.zero_point is None else start.zero_point.float().T
        self.low, self.high = -(2 ** (spec.bits - 1)) - zero, 2 ** (spec.bits - 1) - 1 - zero
        self.codes = start.codes.T.contiguous().float() - self._spread(zero)
        self.target = target.T.contiguous()
        self.slope = hessian @ self._missing()

    def errors(self) -> Tensor:
        """Of each row."""
        return (self._missing() * self.slope).sum(0)

    def sweep(self) -> None:
        """Every group in turn: first its scale, then its codes."""
        for group in range(len(self.scale)):
            here = slice(group * self.width, (group + 1) * self.width)
            own = self.hessian[here, here]
            change = self._move_scale(group, here, own)
            local = self.slope[here] - own @ change
            for first in range(0, self.width, BLOCK):
                block = slice(first, min(first + BLOCK, self.width))
                bounds = self.scale[group], self.low[group], self.high[group]
                moved = descend(self.codes[here][block], local[block], own[block, block], *bounds)
                change[block] += moved
                if block.stop < self.width:
                    local -= own[:, block] @ moved
            self.slope -= self.hessian[:, here] @ change

    def result(self, start: QuantizedWeight, *, better: Tensor) -> QuantizedWeight:
        """The weight as it is now in rows that are `better`, else as it was."""
        zero = 0 if start.zero_point is None else self._spread(start.zero_point.float().T)
        codes = (self.codes + zero).T.to(torch.int8)
        kept = better.unsqueeze(1)
        return QuantizedWeight(
            torch.where(kept, codes, start.codes),
            torch.where(kept, self.scale.T.to(self.stored), start.scale),
            start.zero_point,
        )

    def _move_scale(self, group: int, here: slice, own: Tensor) -> Tensor:
        """Take the best scale of the group for its codes, where it is better as stored: change of the values."""
        codes, scale = self.codes[here], self.scale[group]
        toward, curve = (codes * self.slope[here]).sum(0), (codes * (own @ codes)).sum(0)
        wanted = scale + toward / curve.clamp(min=1e-30)
        if self.step is None:
            wanted = nearest_scale(wanted, self.spec, self.stored).float()
            usable = (wanted.abs() >= torch.finfo(self.stored).tiny) & (wanted * scale > 0)
        else:
            usable = wanted * scale > 0
            wanted = to_multiples(wanted, self.step, self.stored).float()
        move = wanted - scale
        gains = usable & (move * (2 * toward - move * curve) > 0)
        self.scale[group] = torch.where(gains, wanted, scale)
        return codes * torch.where(gains, move, 0.0)

    def _missing(self) -> Tensor:
        return self.target - self.codes * self._spread(self.scale)

    def _spread(self, per_group: Tensor) -> Tensor:
        """[groups, rows] to [channels, rows]."""
        return per_group.repeat_interleave(self.width, dim=0)
