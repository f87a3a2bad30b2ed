"""Linear for a few tokens that are not rounded, with weights of up to four bits: integer products of their digits.

Activations come as integers of four digits, see `triton.quantize.split`, which are columns of the product that the
matrix unit would have left empty. A weight is an operand as it is stored, up to one shift and one mask for four codes;
as floats the same codes take four times the instructions. Sums are exact within a group of the weight.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.launching import empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.sums import add_parts
from optimum_qvlm.kernels.triton.unpack import sixteenfold_nibbles

DIGITS = 4


@triton.jit
def digits_kernel(
    digits, x_scale, codes, scale, bias, y,
    tokens, rows,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = x W^T + bias, of `digits` [tokens, 4, WIDTH] and `x_scale` [tokens, WIDTH / 128].

    GROUP is a multiple of 128; one step takes SLICES blocks of 128 channels, a warp for each. With more than one of
    PARTS, that many programs share the channels of a tile, and y is [PARTS, tokens, rows].
    """
    BLOCKS: tl.constexpr = WIDTH // 128
    STEPS: tl.constexpr = (BLOCKS + SLICES - 1) // SLICES
    SHARE: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    COLUMNS: tl.constexpr = 4 * BLOCK_TOKENS
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_token = tl.program_id(1) * BLOCK_TOKENS
    part = tl.program_id(2)
    slice_ = tl.arange(0, SLICES)
    # A thread reads 16 bytes of a row, its neighbours the rows below: the rows of the matrix instruction.
    tile_row = first_row + tl.arange(0, 8)[:, None, None, None] + tl.arange(0, BLOCK_ROWS // 8)[None, None, :, None] * 8
    column = tl.arange(0, 8)[:, None, None, None] + tl.arange(0, COLUMNS // 8)[None, None, :, None] * 8
    offset = tl.arange(0, 64)[None, None, None, :]
    # Rows times channels pass 2**31 in large vocabularies.
    w_row = codes + tl.minimum(tile_row, rows - 1).to(tl.int64) * (WIDTH // 2) + offset
    x_column = digits + (tl.minimum(first_token + column // 4, tokens - 1) * 4 + column % 4) * WIDTH + offset
    row = first_row + tl.arange(0, BLOCK_ROWS)
    safe_row = tl.minimum(row, rows - 1)
    column_token = tl.minimum(first_token + tl.arange(0, COLUMNS) // 4, tokens - 1)

    sums = tl.zeros((SLICES, BLOCK_ROWS, COLUMNS), tl.float32)
    # The bits of 1.5 * 2**23: those of that float plus a sum of 128 products, which is below 2**22.
    empty = tl.full((SLICES, BLOCK_ROWS, COLUMNS), 0x4B400000, tl.int32)
    begin, end = (0, STEPS) if PARTS == 1 else (part * SHARE, tl.minimum((part + 1) * SHARE, STEPS))
    for step in tl.range(begin, end, num_stages=STAGES):
        block = step * SLICES + slice_
        stored = block if BLOCKS % SLICES == 0 else tl.minimum(block, BLOCKS - 1)
        place = stored[None, :, None, None] * 64
        factor = tl.load(scale + (stored * 128 // GROUP)[:, None] * rows + safe_row[None, :])
        x_factor = tl.load(x_scale + column_token[None, :] * BLOCKS + stored[:, None])
        packed = tl.load(w_row + place)
        x_first = tl.load(x_column + place * 2)
        x_second = tl.load(x_column + place * 2 + 64)
        if BLOCKS % SLICES != 0:
            x_factor = tl.where((block < BLOCKS)[:, None], x_factor, 0.0)
        low, high = sixteenfold_nibbles(packed, ASM)
        low, high = _operand(low, SLICES, BLOCK_ROWS), _operand(high, SLICES, BLOCK_ROWS)
        x_first, x_second = _operand(x_first, SLICES, COLUMNS), _operand(x_second, SLICES, COLUMNS)
        product = tl.dot(low, x_first.permute(0, 2, 1), empty, out_dtype=tl.int32)
        product = tl.dot(high, x_second.permute(0, 2, 1), product, out_dtype=tl.int32)
        value = product.to(tl.float32, bitcast=True) - 12582912.0
        sums += value * (factor.to(tl.float32)[:, :, None] * x_factor[:, None, :])
    total = tl.reshape(tl.sum(sums, axis=0), (BLOCK_ROWS, BLOCK_TOKENS, 4))
    weighs = tl.arange(0, 4)
    weighs = tl.where(weighs == 0, 1.0, tl.where(weighs == 1, 256.0, tl.where(weighs == 2, 65536.0, 16777216.0)))
    total = tl.sum(total * (weighs * 0.0625)[None, None, :], axis=2)
    if HAS_BIAS:
        total += tl.load(bias + safe_row).to(tl.float32)[:, None]
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    out = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    if PARTS > 1:
        out += part.to(tl.int64) * tokens * rows
    tl.store(out, total.to(y.dtype.element_ty), mask=(row[:, None] < rows) & (token[None, :] < tokens))


@triton.jit
def _operand(tile, SLICES: tl.constexpr, COUNT: tl.constexpr):
    """[8, SLICES, COUNT / 8, 64] as [SLICES, COUNT, 64], its channels in the order of the matrix instruction.

    Of 32 channels a thread holds two times four side by side. Both operands get the same order, so that the product is
    what it was, and a thread keeps the 16 bytes that it has read.
    """
    tile = tile.permute(1, 2, 0, 3).reshape(SLICES, COUNT, 4, 2, 2, 4)
    return tile.permute(0, 1, 3, 4, 2, 5).reshape(SLICES, COUNT, 64)


def takes(tokens: int, weight: PackedWeight) -> bool:
    """Whether this weight is multiplied with so few tokens here."""
    if weight.bits != 4 or weight.zero_point is not None or weight.group is None or weight.group % 128 != 0:
        return False
    return tokens <= tiles.DIGITS_TOKENS


def linear_digits(digits: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x W^T + bias` in `dtype`, [tokens, out_features].

    Args:
        digits: int8 [tokens, 4, width of the weight], contiguous, with zeros in the padding.
        x_scale: fp32 [tokens, width / 128], contiguous.
        weight: up to four bits, groups of multiples of 128 channels, no zero points, on the device of `digits`.
        bias: [out_features] or None.
        dtype: of the result.
    """
    tokens, rows = digits.shape[0], weight.out_features
    if tokens * rows == 0:
        return empty(digits, tokens, rows, dtype=dtype)
    architecture = tiles.architecture(digits.device)
    tile = tiles.digits_tile(architecture, tokens, rows)
    grid = (-(-rows // tile.rows), -(-tokens // tile.tokens))
    parts = tile.parts(architecture, math.prod(grid), weight.width)
    shape = (tokens, rows) if parts == 1 else (parts, tokens, rows)
    y = empty(digits, *shape, dtype=dtype if parts == 1 else torch.float32)
    arguments = {
        "digits": digits,
        "x_scale": x_scale,
        "codes": weight.codes,
        "scale": weight.scale,
        "bias": weight.scale if bias is None else bias,
        "y": y,
        "tokens": tokens,
        "rows": rows,
        "WIDTH": weight.width,
        "GROUP": weight.group,
        "HAS_BIAS": bias is not None and parts == 1,
        "ASM": tiles.speaks_ptx(digits.device),
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "SLICES": tile.slices,
        "STAGES": tile.stages,
        "PARTS": parts,
    }
    start(digits_kernel, (*grid, parts), arguments, digits.device, num_warps=tile.warps)
    return y if parts == 1 else add_parts(y, bias, dtype)
