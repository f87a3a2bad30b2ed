"""Random distortion of digits, so that held-out handwriting is not new to the model."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distort(ink: Tensor) -> Tensor:
    """Affine and elastic distortion, contrast and noise of ink shares [count, side, side] in 0..255."""
    count, side, _ = ink.shape
    places = F.affine_grid(_affine(ink), [count, 1, side, side], align_corners=False)
    bend = F.interpolate(_uniform(ink, 2, 4, 4, bound=0.16), size=(side, side), mode="bicubic")
    moved = F.grid_sample(ink[:, None], places + bend.permute(0, 2, 3, 1), align_corners=False)[:, 0]
    gain = 1 + _uniform(ink, 1, 1, bound=0.25)
    noise = _uniform(ink, 1, 1, bound=1.0) * _uniform(ink, side, side, bound=20.0)
    return (moved * gain + noise).clamp(0, 255)


def _uniform(like: Tensor, *shape: int, bound: float) -> Tensor:
    """[len(like), *shape] in -bound..bound."""
    return (torch.rand(len(like), *shape, device=like.device) * 2 - 1) * bound


def _affine(ink: Tensor) -> Tensor:
    """Random rotations, shears, scales and shifts [count, 2, 3]."""
    angle, shear = _uniform(ink, bound=0.25), _uniform(ink, bound=0.2)
    wide, high = (1 + _uniform(ink, 2, bound=0.15)).unbind(1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    first = torch.stack([cos * wide, (shear - sin) * high], dim=1)
    second = torch.stack([sin * wide, cos * high], dim=1)
    return torch.cat([torch.stack([first, second], dim=1), _uniform(ink, 2, 1, bound=0.18)], dim=2)
