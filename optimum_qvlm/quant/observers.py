"""Range statistics of activations, from which static scales come."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude_quantiles(x: Tensor, shares: Sequence[float]) -> Tensor:
    """The smallest magnitudes that cover at least these shares of the elements of `x`, fp32 [len(shares)].

    A share of 1.0 gives the peak. No interpolation: every result is the magnitude of an element.
    """
    magnitudes = x.reshape(-1).float().abs()
    count = magnitudes.numel()
    above = [count - max(math.ceil(share * count - 1e-6), 1) for share in shares]
    largest = torch.topk(magnitudes, max(above) + 1).values
    return largest[torch.tensor(above, device=x.device)]


def static_scale(x: Tensor, bits: int, share: float) -> Tensor:
    """Scale fp32 [1] of a symmetric grid whose largest code stands for the quantile `share` of |x|.

    Where that quantile is zero the scale is 1.
    """
    quantile = magnitude_quantiles(x, [share])
    scale = quantile / quantile.new_full((), 2.0 ** (bits - 1) - 1)  # as `optimum_qvlm.kernels.quantize_tokens` divides
    return torch.where(scale > 0, scale, torch.ones_like(scale))
