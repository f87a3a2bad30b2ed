"""The whole weight in floating point, for products so large that a dense one wins."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.launching import empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.unpack import load_weight


@triton.jit
def dequantize_kernel(
    codes, scale, zero, out,
    rows,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr, ASM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out [rows, CHANNELS]; one program per block of rows and block of 128 channels."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe_row = tl.minimum(row, rows - 1)
    block = tl.program_id(1)
    # Rows times channels pass 2**31 in large vocabularies.
    w_row = codes + safe_row.to(tl.int64)[:, None] * (WIDTH * BITS // 8)
    PART: tl.constexpr = 32 if BITS == 6 else 64
    offset = tl.arange(0, PART)
    for part in tl.static_range(0, 64 // PART):
        first, second = load_weight(w_row, block, offset[None, :], part * PART, WIDTH, BITS, tl.float16, ASM)
        channel = block * 128 + part * PART + offset
        _store(first, channel, row, safe_row, scale, zero, out, rows, CHANNELS, GROUP, BITS, HAS_ZERO)
        _store(second, channel + 64, row, safe_row, scale, zero, out, rows, CHANNELS, GROUP, BITS, HAS_ZERO)


@triton.jit
def _store(
    codes, channel, row, safe_row, scale, zero, out, rows,
    CHANNELS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    values = codes.to(tl.float32)
    if BITS == 6:
        values *= 0.25
    if GROUP == 0:
        place = safe_row[:, None] + channel[None, :] * 0
    else:
        place = (channel // GROUP)[None, :] * rows + safe_row[:, None]
    if HAS_ZERO:
        values -= tl.load(zero + place).to(tl.float32)
    values *= tl.load(scale + place).to(tl.float32)
    target = out + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (channel[None, :] < CHANNELS))


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] in `dtype`, rounded once from the product of code and scale."""
    rows = weight.out_features
    out = empty(weight.codes, rows, weight.in_features, dtype=dtype)
    if out.numel() == 0:
        return out
    block_rows = 16
    arguments = {
        "codes": weight.codes,
        "scale": weight.scale,
        "zero": weight.scale if weight.zero_point is None else weight.zero_point,
        "out": out,
        "rows": rows,
        "CHANNELS": weight.in_features,
        "WIDTH": weight.width,
        "GROUP": 0 if weight.group is None else weight.group,
        "BITS": weight.bits,
        "HAS_ZERO": weight.zero_point is not None,
        "ASM": tiles.speaks_ptx(out.device),
        "BLOCK_ROWS": block_rows,
    }
    grid = (-(-rows // block_rows), weight.width // 128)
    start(dequantize_kernel, grid, arguments, out.device, num_warps=4)
    return out
