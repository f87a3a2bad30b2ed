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

_WORDS = tl.constexpr("""{
.reg .b32 t;
shl.b32 t, $2, 4;
and.b32 $1, $2, 0xf0f0f0f0;
and.b32 $0, t, 0xf0f0f0f0;
}""")

_ROLLED = tl.constexpr("""{
.pragma "nounroll";
mov.b32 $0, $1;
}""")

RUN = 8 if triton.__version__.startswith("3.6") else 4


@triton.jit
def digits_kernel(
    digits, x_scale, codes, scale, bias, y,
    tokens, rows,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr, ROLLED: tl.constexpr, AHEAD: tl.constexpr,
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
    # A thread reads 16 bytes of a row, its neighbours the rows below, and the next warp another block of 128 channels.
    w_index = tl.arange(0, SLICES * BLOCK_ROWS)
    tile_row = tl.minimum(first_row + w_index % 8 + w_index // (8 * SLICES) * 8, rows - 1)
    # Rows times channels pass 2**31 in large vocabularies.
    w_row = codes.to(tl.pointer_type(tl.int32)) + tile_row.to(tl.int64)[:, None] * (WIDTH // 8) + tl.arange(0, 16)
    w_slice = w_index // 8 % SLICES
    x_index = tl.arange(0, SLICES * COLUMNS)
    x_slice = x_index // 8 % SLICES
    column = x_index % 8 + x_index // (8 * SLICES) * 8
    column_of = tl.minimum(first_token + column // 4, tokens - 1) * 4 + column % 4
    x_column = digits.to(tl.pointer_type(tl.int32)) + column_of[:, None] * (WIDTH // 4) + tl.arange(0, 16)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    safe_row = tl.minimum(row, rows - 1)
    column_token = tl.minimum(first_token + tl.arange(0, COLUMNS) // 4, tokens - 1)

    sums = tl.zeros((SLICES, BLOCK_ROWS, COLUMNS), tl.float32)
    # The bits of 1.5 * 2**23: those of that float plus a sum of 128 products, which is below 2**22.
    empty = tl.full((SLICES, BLOCK_ROWS, COLUMNS), 0x4B400000, tl.int32)
    begin, end = (0, STEPS) if PARTS == 1 else (part * SHARE, tl.minimum((part + 1) * SHARE, STEPS))
    block = begin * SLICES
    packed, factor = _weights(w_row, w_slice, scale, block, slice_, safe_row, rows, BLOCKS, GROUP)
    if DEPTH > 1:
        packed2, factor2 = _weights(w_row, w_slice, scale, block + SLICES, slice_, safe_row, rows, BLOCKS, GROUP)
    if DEPTH > 2:
        packed3, factor3 = _weights(w_row, w_slice, scale, block + 2 * SLICES, slice_, safe_row, rows, BLOCKS, GROUP)
    if AHEAD:
        x_first, x_second, x_factor = _tokens(x_column, x_slice, x_scale, block, slice_, column_token, BLOCKS)
    for step in tl.range(begin, end, num_stages=1):
        block = step * SLICES
        if ASM and ROLLED:
            block = tl.inline_asm_elementwise(_ROLLED, "=r,r", [block], dtype=tl.int32, is_pure=False, pack=1)
        # Asked for before those of this step are wanted.
        next_packed, next_factor = _weights(w_row, w_slice, scale, block + SLICES * DEPTH, slice_, safe_row, rows, BLOCKS, GROUP)
        if AHEAD:
            next_first, next_second, next_x_factor = _tokens(x_column, x_slice, x_scale, block + SLICES, slice_, column_token, BLOCKS)
        else:
            x_first, x_second, x_factor = _tokens(x_column, x_slice, x_scale, block, slice_, column_token, BLOCKS)
        if BLOCKS % SLICES != 0:
            x_factor = tl.where((block + slice_ < BLOCKS)[:, None], x_factor, 0.0)
        low, high = _sixteenfold_words(packed, ASM)
        low, high = _operand(_bytes(low), SLICES, BLOCK_ROWS, RUN), _operand(_bytes(high), SLICES, BLOCK_ROWS, RUN)
        first, second = _operand(_bytes(x_first), SLICES, COLUMNS, RUN), _operand(_bytes(x_second), SLICES, COLUMNS, RUN)
        product = tl.dot(low, first.permute(0, 2, 1), empty, out_dtype=tl.int32)
        product = tl.dot(high, second.permute(0, 2, 1), product, out_dtype=tl.int32)
        value = product.to(tl.float32, bitcast=True) - 12582912.0
        sums += value * (factor.to(tl.float32)[:, :, None] * x_factor[:, None, :])
        if DEPTH == 1:
            packed, factor = next_packed, next_factor
        elif DEPTH == 2:
            packed, factor = packed2, factor2
            packed2, factor2 = next_packed, next_factor
        else:
            packed, factor = packed2, factor2
            packed2, factor2 = packed3, factor3
            packed3, factor3 = next_packed, next_factor
        if AHEAD:
            x_first, x_second, x_factor = next_first, next_second, next_x_factor
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
def _weights(w_row, w_slice, scale, block, slice_, safe_row, rows, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Codes [slices * rows, 16], four bytes each, and scales [slices, rows]; past the last block those of it."""
    stored = tl.minimum(block + slice_, BLOCKS - 1)
    factor = tl.load(scale + (stored * 128 // GROUP)[:, None] * rows + safe_row[None, :])
    return tl.load(w_row + tl.minimum(block + w_slice, BLOCKS - 1)[:, None] * 16), factor


@triton.jit
def _tokens(x_column, x_slice, x_scale, block, slice_, column_token, BLOCKS: tl.constexpr):
    place = x_column + (tl.minimum(block + x_slice, BLOCKS - 1) * 32)[:, None]
    factor = tl.load(x_scale + column_token[None, :] * BLOCKS + tl.minimum(block + slice_, BLOCKS - 1)[:, None])
    return tl.load(place), tl.load(place + 16), factor


@triton.jit
def _sixteenfold_words(words, ASM: tl.constexpr):
    """Sixteen times the codes of the low and of the high nibbles, four bytes in an int32."""
    if ASM:
        # The compiler would mix its shifts with those that take the bytes apart, and then do both.
        return tl.inline_asm_elementwise(
            _WORDS, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        return (words << 4) & -252645136, words & -252645136


@triton.jit
def _bytes(words):
    """int8 [count, 64] of [count, 16] words: the same bits."""
    first = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    second = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(first, second), (words.shape[0], 64))


@triton.jit
def _operand(tile, SLICES: tl.constexpr, COUNT: tl.constexpr, RUN: tl.constexpr):
    """[COUNT / 8 * SLICES * 8, 64] as [SLICES, COUNT, 64], its channels in the order of the matrix instruction.

    A thread holds RUN of them side by side. Both operands get the same order, so that the product is what it was, and a
    thread keeps the 16 bytes that it has read.
    """
    tile = tile.reshape(COUNT // 8, SLICES, 8, 64)
    tile = tile.permute(1, 0, 2, 3)
    if RUN == 8:
        tile = tile.reshape(SLICES, COUNT, 4, 2, 8).permute(0, 1, 3, 2, 4)
    else:
        tile = tile.reshape(SLICES, COUNT, 4, 2, 2, 4).permute(0, 1, 3, 4, 2, 5)
    return tile.reshape(SLICES, COUNT, 64)


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
        "RUN": RUN,
        "HAS_BIAS": bias is not None and parts == 1,
        "ASM": tiles.speaks_ptx(digits.device),
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "SLICES": tile.slices,
        "ROLLED": getattr(tiles, "ROLLED", True),
        "AHEAD": getattr(tiles, "AHEAD", True),
        "DEPTH": tile.stages,
        "PARTS": parts,
    }
    start(digits_kernel, (*grid, parts), arguments, digits.device, num_warps=tile.warps)
    return y if parts == 1 else add_parts(y, bias, dtype)
