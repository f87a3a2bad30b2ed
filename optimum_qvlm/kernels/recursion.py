"""What rounding a weight does channel after channel: the definitions, and who computes them on which device.

A GPU would spend its time on the launches of single channels, so there a kernel does a block of them at once.
"""

import torch
from torch import Tensor

from optimum_qvlm.kernels import dispatch


def feed_back(block: Tensor, factor: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recursion of error feedback over the channels of one block, which it uses up.

    Args:
        block: fp32 [channels, rows], what the weight should be, given what was done to the channels before.
        factor: fp32 [channels, channels], the block's part of the upper triangular factor of the inverse Hessian.
        bits: of the codes.
        scale: [rows], or [channels, rows].
        zero: of that shape, or None on a symmetric grid.

    Returns:
        Codes as fp32 and the errors over the pivots, both [channels, rows].
    """
    backend = dispatch.recursion(block.device)
    if backend is not None:
        codes, errors = backend.feed_back(block, factor, bits, scale, zero)
        return codes, errors
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = scale.float().expand_as(block)
    shift = None if zero is None else zero.float().expand_as(block)
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    pivots = factor.diagonal().tolist()
    for channel, pivot in enumerate(pivots):
        value, step = block[channel], scale[channel]
        code = torch.round(value / step)
        if shift is None:
            code.clamp_(low, high)
            near = code * step
        else:
            code.add_(shift[channel]).clamp_(low, high)
            near = (code - shift[channel]) * step
        codes[channel] = code
        error = torch.sub(value, near, out=errors[channel]).div_(pivot)
        if channel + 1 < len(pivots):
            block[channel + 1 :].addr_(factor[channel, channel + 1 :], error, alpha=-1)
    return codes, errors


def descend(codes: Tensor, slope: Tensor, curvature: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The best code of each channel of a block in turn, given all others; `codes` change and `slope` is used up.

    Args:
        codes: fp32 [channels, rows], without zero points; contiguous.
        slope: fp32 [channels, rows], the Hessian times what the rounded weight lacks.
        curvature: fp32 [channels, channels], the block's part of the Hessian, positive on its diagonal.
        scale: fp32 [rows].
        low, high: fp32 [rows], the least and the largest code.

    Returns:
        Change of the values, fp32 [channels, rows].
    """
    backend = dispatch.recursion(codes.device)
    if backend is not None:
        changed: Tensor = backend.descend(codes, slope, curvature, scale, low, high)
        return changed
    moved = torch.empty_like(codes)
    for channel, pivot in enumerate(curvature.diagonal().tolist()):
        steps = slope[channel] / (pivot * scale)
        code = torch.round(steps.add_(codes[channel])).clamp_(low, high)
        torch.sub(code, codes[channel], out=moved[channel]).mul_(scale)
        codes[channel] = code
        slope[channel + 1 :].addr_(curvature[channel + 1 :, channel], moved[channel], alpha=-1)
    return moved
