"""Channel after channel on a GPU: a launch does a whole block, of which every row is independent of the others."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.triton.integers import nearest_floats

ROWS = 32
"""Rows of a program, which is one warp: sums over channels stay inside it."""


@triton.jit
def feed_back_kernel(
    block, factor, scale, zero, codes, errors,
    rows, factor_stride, scale_stride, zero_stride,
    CHANNELS: tl.constexpr, SPAN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """See `optimum_qvlm.kernels.recursion.feed_back`. SPAN is the power of two at or above CHANNELS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    channel = tl.arange(0, SPAN)
    held = channel < CHANNELS
    values = tl.load(block + channel[:, None] * rows + row[None, :], mask=held[:, None] & inside[None, :], other=0.0)
    for here in range(0, CHANNELS):
        value = tl.sum(tl.where((channel == here)[:, None], values, 0.0), axis=0)
        step = tl.load(scale + here * scale_stride + row, mask=inside, other=1.0)
        shift = 0.0
        if HAS_ZERO:
            shift = tl.load(zero + here * zero_stride + row, mask=inside, other=0.0)
        code = _nearest(tl.div_rn(value, step), LOW - shift, HIGH - shift)
        ahead = tl.load(factor + here * factor_stride + channel, mask=held & (channel >= here), other=0.0)
        pivot = tl.load(factor + here * factor_stride + here)
        error = tl.div_rn(value - code * step, pivot + tl.zeros((ROWS,), tl.float32))
        tl.store(codes + here * rows + row, code + shift, mask=inside)
        tl.store(errors + here * rows + row, error, mask=inside)
        values -= ahead[:, None] * error[None, :]


@triton.jit
def descend_kernel(
    codes, slope, curvature, scale, low, high, moved,
    rows, curvature_stride,
    CHANNELS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `optimum_qvlm.kernels.recursion.descend`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    channel = tl.arange(0, SPAN)
    held = channel < CHANNELS
    slopes = tl.load(slope + channel[:, None] * rows + row[None, :], mask=held[:, None] & inside[None, :], other=0.0)
    step = tl.load(scale + row, mask=inside, other=1.0)
    least = tl.load(low + row, mask=inside, other=0.0)
    most = tl.load(high + row, mask=inside, other=0.0)
    for here in range(0, CHANNELS):
        local = tl.sum(tl.where((channel == here)[:, None], slopes, 0.0), axis=0)
        line = tl.load(curvature + here * curvature_stride + channel, mask=held, other=0.0)
        pivot = tl.load(curvature + here * curvature_stride + here)
        old = tl.load(codes + here * rows + row, mask=inside, other=0.0)
        code = _nearest(tl.div_rn(local, pivot * step) + old, least, most)
        change = (code - old) * step
        tl.store(codes + here * rows + row, code, mask=inside)
        tl.store(moved + here * rows + row, change, mask=inside)
        slopes -= line[:, None] * change[None, :]


@triton.jit
def _nearest(value, low, high):
    """The integer in low..high that is nearest, halves to even: bounds are integers below 2**22."""
    return nearest_floats(tl.minimum(tl.maximum(value, low), high))


def feed_back(block: Tensor, factor: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the definition, up to the last bit of sums."""
    channels, rows = block.shape
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    scale, scale_stride = _by_channel(scale, rows)
    shift, zero_stride = (scale, 0) if zero is None else _by_channel(zero, rows)
    with torch.cuda.device_of(block):
        feed_back_kernel[(-(-rows // ROWS),)](
            block.contiguous(),
            factor.contiguous(),
            scale,
            shift,
            codes,
            errors,
            rows,
            channels,
            scale_stride,
            zero_stride,
            CHANNELS=channels,
            SPAN=triton.next_power_of_2(channels),
            LOW=-(2 ** (bits - 1)),
            HIGH=2 ** (bits - 1) - 1,
            HAS_ZERO=zero is not None,
            ROWS=ROWS,
            num_warps=1,
        )
    return codes, errors


def descend(codes: Tensor, slope: Tensor, curvature: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As the definition, up to the last bit of sums."""
    channels, rows = codes.shape
    assert codes.is_contiguous()
    moved = torch.empty_like(codes)
    with torch.cuda.device_of(codes):
        descend_kernel[(-(-rows // ROWS),)](
            codes,
            slope.contiguous(),
            curvature.contiguous(),
            scale.contiguous(),
            low.contiguous(),
            high.contiguous(),
            moved,
            rows,
            channels,
            CHANNELS=channels,
            SPAN=triton.next_power_of_2(channels),
            ROWS=ROWS,
            num_warps=1,
        )
    return moved


def _by_channel(values: Tensor, rows: int) -> tuple[Tensor, int]:
    """fp32 values of [rows] or [channels, rows], and how far those of the next channel lie."""
    values = values.float().contiguous()
    return values, rows if values.dim() == 2 else 0
