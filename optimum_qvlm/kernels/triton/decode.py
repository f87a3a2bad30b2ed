"""Linear for few tokens: weight-only arithmetic, bound by the bytes of the weight.

The product is taken as weight times tokens, so that the weight is the operand in registers and eight tokens suffice.
Each warp of a program takes its own blocks of the reduction axis and their sums are added once at the end, in a fixed
order: no atomics, and the same bits in every run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.epilogue import store_product
from optimum_qvlm.kernels.triton.launching import empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.sums import add_parts
from optimum_qvlm.kernels.triton.unpack import load_weight


@triton.jit
def decode_kernel(
    x, codes, scale, zero, bias, y,
    tokens, rows, token_stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr, FULL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = x W^T + bias. GROUP 0 is the whole row; one step takes SLICES blocks of 128 channels.

    FULL says that every program has all its tokens. With more than one of PARTS, that many programs share the channels
    of a tile, and y is [PARTS, tokens, rows].
    """
    ROW_BYTES: tl.constexpr = WIDTH * BITS // 8
    HALF: tl.constexpr = 32 if BITS == 6 else 64
    PART: tl.constexpr = GROUP if GROUP > 0 and GROUP < HALF else HALF
    BLOCKS: tl.constexpr = WIDTH // 128
    DTYPE: tl.constexpr = x.dtype.element_ty
    FOLD: tl.constexpr = 4 if BITS == 6 else 1
    STEPS: tl.constexpr = (BLOCKS + SLICES - 1) // SLICES
    SHARE: tl.constexpr = (STEPS + PARTS - 1) // PARTS

    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe_row = tl.minimum(row, rows - 1)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    here = (token < tokens)[None, None, :]
    MASKED: tl.constexpr = not FULL or CHANNELS % (128 * SLICES) != 0
    # Rows times channels pass 2**31 in large vocabularies, tokens times channels in long batches.
    w_row = codes + safe_row.to(tl.int64)[None, :, None] * ROW_BYTES
    x_token = x + token.to(tl.int64)[None, None, :] * token_stride
    slice_ = tl.arange(0, SLICES)
    offset = tl.arange(0, PART)

    sums = tl.zeros((SLICES, BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    x_sums = tl.zeros((SLICES, BLOCK_TOKENS), tl.float32)
    part_of_sum = tl.program_id(2)
    begin, end = (0, STEPS) if PARTS == 1 else (part_of_sum * SHARE, tl.minimum((part_of_sum + 1) * SHARE, STEPS))
    if GROUP >= 128:
        # Scales are too narrow for asynchronous copies, so they are asked for one step before they are wanted.
        factor, shift = _factors(scale, zero, begin * SLICES + slice_, safe_row, rows, BLOCKS, GROUP, HAS_ZERO)
    for step in tl.range(begin, end, num_stages=STAGES):
        block = step * SLICES + slice_
        stored = block if BLOCKS % SLICES == 0 else tl.minimum(block, BLOCKS - 1)
        if GROUP >= 128:
            next_factor, next_shift = _factors(scale, zero, block + SLICES, safe_row, rows, BLOCKS, GROUP, HAS_ZERO)
        for part in tl.static_range(0, 64 // PART):
            channel = (block[:, None] * 128 + part * PART + offset[None, :])[:, :, None]
            if MASKED:
                x_first = tl.load(x_token + channel, mask=here & (channel < CHANNELS), other=0.0)
                x_second = tl.load(x_token + channel + 64, mask=here & (channel + 64 < CHANNELS), other=0.0)
            else:
                x_first = tl.load(x_token + channel)
                x_second = tl.load(x_token + channel + 64)
            w_first, w_second = load_weight(
                w_row, stored[:, None, None], offset[None, None, :], part * PART, WIDTH, BITS, DTYPE, ASM
            )
            if GROUP == 0:
                sums = tl.dot(w_first, x_first, sums, input_precision="ieee")
                sums = tl.dot(w_second, x_second, sums, input_precision="ieee")
                if HAS_ZERO:
                    x_sums += tl.sum(x_first.to(tl.float32), axis=1) + tl.sum(x_second.to(tl.float32), axis=1)
            elif GROUP >= 128:
                product = tl.dot(w_first, x_first, input_precision="ieee")
                product = tl.dot(w_second, x_second, product, input_precision="ieee")
                if HAS_ZERO:
                    x_first = x_first.to(tl.float32) + x_second.to(tl.float32)
                sums += _scaled(product, x_first, factor, shift, FOLD, HAS_ZERO)
            else:
                group = (stored * 128 + part * PART) // GROUP
                factor, shift = _group_factors(scale, zero, group, safe_row, rows, HAS_ZERO)
                group = (stored * 128 + 64 + part * PART) // GROUP
                other_factor, other_shift = _group_factors(scale, zero, group, safe_row, rows, HAS_ZERO)
                product = tl.dot(w_first, x_first, input_precision="ieee")
                sums += _scaled(product, x_first, factor, shift, FOLD, HAS_ZERO)
                product = tl.dot(w_second, x_second, input_precision="ieee")
                sums += _scaled(product, x_second, other_factor, other_shift, FOLD, HAS_ZERO)
        if GROUP >= 128:
            factor, shift = next_factor, next_shift
    total = tl.sum(sums, axis=0)
    if GROUP == 0:
        if HAS_ZERO:
            shift = tl.load(zero + safe_row).to(tl.float32)[:, None] * FOLD
            total -= shift * tl.sum(x_sums, axis=0)[None, :]
        total *= tl.load(scale + safe_row).to(tl.float32)[:, None]
    if BITS == 6:
        total *= 0.25
    store_product(total, y, bias, row, token, rows, tokens, part_of_sum, HAS_BIAS, PARTS)


@triton.jit
def _factors(
    scale, zero, block, row, rows, BLOCKS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr
):  # fmt: skip
    """Scales and zero points [slices, rows] of whole blocks; those past the last are the last's."""
    group = tl.minimum(block, BLOCKS - 1) * 128 // GROUP
    return _group_factors(scale, zero, group, row, rows, HAS_ZERO)


@triton.jit
def _group_factors(scale, zero, group, row, rows, HAS_ZERO: tl.constexpr):
    """Scales and zero points [slices, rows] of one group per slice, as stored; without zero points scales twice."""
    place = group[:, None] * rows + row[None, :]
    factor = tl.load(scale + place)
    if HAS_ZERO:
        shift = tl.load(zero + place)
    else:
        shift = factor
    return factor, shift


@triton.jit
def _scaled(product, x, factor, shift, FOLD: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Partial sums [slices, rows, tokens] of one group in units of the weight; FOLD times the codes went in."""
    if HAS_ZERO:
        product -= (shift.to(tl.float32) * FOLD)[:, :, None] * tl.sum(x.to(tl.float32), axis=1)[:, None, :]
    return product * factor.to(tl.float32)[:, :, None]


def linear_decode(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` in the dtype of `x`, [tokens, out_features].

    Args:
        x: [tokens, in_features] in fp16, bf16 or fp32, transformed already where the site has a transform; rows
            contiguous.
        weight: on the device of `x`.
        bias: [out_features] or None.
    """
    tokens, rows = x.shape[0], weight.out_features
    if tokens * rows == 0:
        return empty(x, tokens, rows)
    architecture = tiles.architecture(x.device)
    tile = tiles.decode_tile(architecture, weight.bits, weight.group, tokens, rows)
    grid = (-(-rows // tile.rows), -(-tokens // tile.tokens))
    parts = tile.parts(architecture, math.prod(grid), weight.width)
    y = empty(x, tokens, rows) if parts == 1 else empty(x, parts, tokens, rows, dtype=torch.float32)
    arguments = {
        "x": x,
        "codes": weight.codes,
        "scale": weight.scale,
        "zero": weight.scale if weight.zero_point is None else weight.zero_point,
        "bias": weight.scale if bias is None else bias,
        "y": y,
        "tokens": tokens,
        "rows": rows,
        "token_stride": x.stride(0),
        "CHANNELS": weight.in_features,
        "WIDTH": weight.width,
        "GROUP": 0 if weight.group is None else weight.group,
        "BITS": weight.bits,
        "HAS_ZERO": weight.zero_point is not None,
        "HAS_BIAS": bias is not None and parts == 1,
        "ASM": tiles.speaks_ptx(x.device),
        "FULL": tokens % tile.tokens == 0,
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "SLICES": tile.slices,
        "STAGES": tile.stages,
        "PARTS": parts,
    }
    most = tile.limit(zero_points=weight.zero_point is not None)
    limit = {} if most is None or not arguments["ASM"] else {"maxnreg": most}
    start(decode_kernel, (*grid, parts), arguments, x.device, num_warps=tile.warps, **limit)
    return y if parts == 1 else add_parts(y, bias, x.dtype)
