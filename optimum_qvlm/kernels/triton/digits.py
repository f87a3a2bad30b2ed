"""Linear for a few tokens that are not rounded, with weights of up to four bits: integer products of their digits.

Activations come as integers of four digits, see `triton.quantize.split`, which are columns of the product that the
matrix unit would have left empty. Eight codes of a weight are operands after one shift and two masks, a quarter of what
they take as floats. Sums are exact within 128 channels, scaled in fp32, and added in a fixed order.

A program waits for memory most of its time. So every thread keeps the 16 bytes that it has read, without a way through
shared memory, and has asked for the next ones before it uses them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.epilogue import store_product
from optimum_qvlm.kernels.triton.integers import HOLDER_BITS, held_floats
from optimum_qvlm.kernels.triton.launching import ALIGNMENT, empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.sums import add_parts
from optimum_qvlm.kernels.triton.unpack import NIBBLES_INT8

_ROLLED = tl.constexpr(
    "{\n"
    '.pragma "nounroll";\n'  # ptxas is not to unroll the loop that this stands in
    "mov.b32 $0, $1;\n"  # the value as it is
    "}"
)

RUN = 8 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 4
"""Channels side by side in a thread's operand of a product, as this Triton wants them where they were read as words."""


@triton.jit
def digits_kernel(
    digits, x_scale, codes, scale, bias, y,
    tokens, rows,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = x W^T + bias, of `digits` [tokens, 4, WIDTH] and `x_scale` [tokens, WIDTH / 128].

    GROUP is a multiple of 128. A step takes STAGES times SLICES blocks of 128 channels, a warp for each of SLICES.
    CHAINED programs start while `digits` are still written. With more than one of PARTS, that many programs share the
    channels of a tile, and y is [PARTS, tokens, rows].
    """
    BLOCKS: tl.constexpr = WIDTH // 128
    STRIDE: tl.constexpr = SLICES * STAGES
    STEPS: tl.constexpr = (BLOCKS + STRIDE - 1) // STRIDE
    SHARE: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    COLUMNS: tl.constexpr = 4 * BLOCK_TOKENS
    first_row = tl.program_id(0) * BLOCK_ROWS
    first_token = tl.program_id(1) * BLOCK_TOKENS
    part = tl.program_id(2)
    # A thread reads 16 bytes of a row, its neighbours the rows below, and the next warp another block of 128 channels.
    index = tl.arange(0, SLICES * BLOCK_ROWS)
    tile_row = tl.minimum(first_row + index % 8 + index // (8 * SLICES) * 8, rows - 1)
    # Rows times channels pass 2**31 in large vocabularies.
    w_row = codes.to(tl.pointer_type(tl.int32)) + tile_row.to(tl.int64)[:, None] * (WIDTH // 8) + tl.arange(0, 16)
    w_slice = index // 8 % SLICES
    row = first_row + tl.arange(0, BLOCK_ROWS)
    safe_row = tl.minimum(row, rows - 1)
    slice_ = tl.arange(0, SLICES)
    # Columns are the digits of one token after those of another.
    index = tl.arange(0, SLICES * COLUMNS)
    column = index % 8 + index // (8 * SLICES) * 8
    column = tl.minimum(first_token + column // 4, tokens - 1) * 4 + column % 4
    x_column = digits.to(tl.pointer_type(tl.int32)) + column[:, None] * (WIDTH // 4) + tl.arange(0, 16)
    x_slice = index // 8 % SLICES
    scale_column = x_scale + tl.minimum(first_token + tl.arange(0, COLUMNS) // 4, tokens - 1) * BLOCKS

    sums = tl.zeros((SLICES, BLOCK_ROWS, COLUMNS), tl.float32)
    # A sum of 128 products is below 2**22.
    empty = tl.full((SLICES, BLOCK_ROWS, COLUMNS), HOLDER_BITS, tl.int32)
    begin, end = (0, STEPS) if PARTS == 1 else (part * SHARE, tl.minimum((part + 1) * SHARE, STEPS))
    weights = ()
    for stage in tl.static_range(0, STAGES):
        block = begin * STRIDE + stage * SLICES
        ahead = _weights(w_row, w_slice, scale, slice_, safe_row, block, rows, BLOCKS, GROUP)
        weights = weights + (ahead,)  # noqa: RUF005, for Triton
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    columns = ()
    for stage in tl.static_range(0, STAGES):
        block = begin * STRIDE + stage * SLICES
        x_ahead = _columns(x_column, x_slice, scale_column, slice_, block, BLOCKS)
        columns = columns + (x_ahead,)  # noqa: RUF005
    for step in tl.range(begin, end, num_stages=1):
        first_block = step * STRIDE
        if ASM:
            # Unrolled, the assembler would ask for words just before they are used.
            first_block = tl.inline_asm_elementwise(_ROLLED, "=r,r", [first_block], tl.int32, is_pure=False, pack=1)
        next_weights = ()
        next_columns = ()
        for stage in tl.static_range(0, STAGES):
            block = first_block + stage * SLICES
            packed, factor = weights[stage]
            x_first, x_second, x_factor = columns[stage]
            low, high = _sixteenfold(packed, ASM)
            low = _operand(low, SLICES, BLOCK_ROWS, RUN)
            high = _operand(high, SLICES, BLOCK_ROWS, RUN)
            x_first = _operand(x_first, SLICES, COLUMNS, RUN).permute(0, 2, 1)
            x_second = _operand(x_second, SLICES, COLUMNS, RUN).permute(0, 2, 1)
            product = tl.dot(low, x_first, empty, out_dtype=tl.int32)
            product = tl.dot(high, x_second, product, out_dtype=tl.int32)
            if BLOCKS % STRIDE != 0:
                x_factor = tl.where((block + slice_ < BLOCKS)[:, None], x_factor, 0.0)
            values = held_floats(product)
            sums += values * (factor.to(tl.float32)[:, :, None] * x_factor[:, None, :])
            if STEPS > 1:
                block += STRIDE
                ahead = _weights(w_row, w_slice, scale, slice_, safe_row, block, rows, BLOCKS, GROUP)
                next_weights = next_weights + (ahead,)  # noqa: RUF005
                x_ahead = _columns(x_column, x_slice, scale_column, slice_, block, BLOCKS)
                next_columns = next_columns + (x_ahead,)  # noqa: RUF005
        if STEPS > 1:
            weights = next_weights
            columns = next_columns
    digit = tl.arange(0, 4)
    # A digit weighs 256 times the one before, and sixteen times the codes went in.
    weight = tl.where(digit == 0, 0.0625, tl.where(digit == 1, 16.0, tl.where(digit == 2, 4096.0, 1048576.0)))
    total = tl.reshape(tl.sum(sums, axis=0), (BLOCK_ROWS, BLOCK_TOKENS, 4))
    total = tl.sum(total * weight[None, None, :], axis=2)
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    store_product(total, y, bias, row, token, rows, tokens, part, HAS_BIAS, PARTS)


@triton.jit
def _weights(
    w_row, w_slice, scale, slice_, row, block, rows, BLOCKS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Codes [slices * rows, 16], eight in a word, and scales [slices, rows]; past the last block those of it."""
    codes = tl.load(w_row + tl.minimum(block + w_slice, BLOCKS - 1)[:, None] * 16)
    group = tl.minimum(block + slice_, BLOCKS - 1) * 128 // GROUP
    return codes, tl.load(scale + group[:, None] * rows + row[None, :])


@triton.jit
def _columns(x_column, x_slice, scale_column, slice_, block, BLOCKS: tl.constexpr):
    """Digits of both halves of a block [slices * columns, 16], four in a word, and scales [slices, columns]."""
    place = x_column + tl.minimum(block + x_slice, BLOCKS - 1)[:, None] * 32
    factor = tl.load(scale_column[None, :] + tl.minimum(block + slice_, BLOCKS - 1)[:, None])
    return tl.load(place), tl.load(place + 16), factor


@triton.jit
def _sixteenfold(words, ASM: tl.constexpr):
    """Sixteen times the codes of the low and of the high nibbles, four bytes in a word."""
    if ASM:
        # The compiler would mix this shift with those that take the bytes apart, and then do all of them.
        return tl.inline_asm_elementwise(NIBBLES_INT8, "=r,=r,r", [words], (tl.int32, tl.int32), is_pure=True, pack=1)
    else:
        return (words << 4) & -0x0F0F0F10, words & -0x0F0F0F10


@triton.jit
def _operand(words, SLICES: tl.constexpr, COUNT: tl.constexpr, RUN: tl.constexpr):
    """Bytes [SLICES, COUNT, 64] of words [COUNT / 8 * SLICES * 8, 16], in the order of the matrix instruction.

    Both operands get the same order of channels, so that the product is what it was, and a thread keeps what it read:
    all of this is renaming.
    """
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    tile = tl.join(even, odd).reshape(COUNT // 8, SLICES, 8, 64).permute(1, 0, 2, 3)
    if RUN == 8:
        tile = tile.reshape(SLICES, COUNT, 4, 2, 8).permute(0, 1, 3, 2, 4)
    else:
        tile = tile.reshape(SLICES, COUNT, 4, 2, 2, 4).permute(0, 1, 3, 4, 2, 5)
    return tile.reshape(SLICES, COUNT, 64)


def takes(tokens: int, weight: PackedWeight) -> bool:
    """Whether this weight is multiplied with so many tokens here."""
    if weight.bits != 4 or weight.zero_point is not None or weight.group is None or weight.group % 128 != 0:
        return False
    # Words are read, as asynchronous copies would, from multiples of 16 bytes.
    return tokens <= tiles.DIGITS_TOKENS and weight.codes.data_ptr() % ALIGNMENT == 0


def linear_digits(
    digits: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
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
    chained = tiles.chains(digits.device)
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
        "CHAINED": chained,
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "SLICES": tile.slices,
        "STAGES": tile.stages,
        "PARTS": parts,
    }
    chain = {"launch_pdl": True} if chained else {}
    start(digits_kernel, (*grid, parts), arguments, digits.device, num_warps=tile.warps, **chain)
    return y if parts == 1 else add_parts(y, bias, dtype)
