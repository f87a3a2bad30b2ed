"""Linear for many tokens: integer dot products where activations are integers, rescaled in fp32 once per group.

As in decoding the weight is the left operand, unpacked in registers, and tokens are loaded as they are. Where a weight
has one scale per row, sums stay integers to the end. Activations that are not rounded multiply the codes as floats,
which hold them exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.epilogue import scaled_by_tokens, store_product
from optimum_qvlm.kernels.triton.integers import HOLDER_BITS, held_floats
from optimum_qvlm.kernels.triton.launching import empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.sums import add_parts
from optimum_qvlm.kernels.triton.unpack import load_bytes, load_weight

LEAST_GROUP = 32
"""Integer dot products take at least 32 channels; with smaller groups the codes are multiplied as floats, exactly."""

_OPERANDS = {
    torch.int8: tl.int8,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit
def prefill_kernel(
    x, x_scale, codes, scale, zero, bias, y,
    tokens, rows, token_stride,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, X_GROUPS: tl.constexpr,
    DTYPE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr, FLOAT_TRICK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, SETTLES: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = (x times its scales) W^T + bias, with operands of DTYPE.

    GROUP 0 is the whole row, which eight bits always have. X_GROUPS counts the scales of a token; 1 is applied at the
    end, 0 is one for all tokens, -1 is none. STRIP programs of neighbouring rows share their tokens in cache. With more
    than one of PARTS, that many programs share the channels of a tile, and y is [PARTS, tokens, rows].
    """
    BLOCKS: tl.constexpr = WIDTH // 128
    SHARE: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    SPAN: tl.constexpr = 128 if BITS == 8 else 64
    HALF: tl.constexpr = 32 if BITS == 6 else SPAN
    PART: tl.constexpr = GROUP if GROUP > 0 and GROUP < HALF else HALF
    INTEGER: tl.constexpr = DTYPE == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    FOLD: tl.constexpr = (16 if INTEGER else 1) if BITS == 4 else 4 if BITS == 6 else 1
    row_block, token_block = place(rows, tokens, BLOCK_ROWS, BLOCK_TOKENS, STRIP)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    safe_row = tl.minimum(row, rows - 1)
    safe_token = tl.minimum(token, tokens - 1)
    # Rows times channels and tokens times channels pass 2**31 in large vocabularies and long batches.
    w_row = codes + safe_row.to(tl.int64)[:, None] * (WIDTH * BITS // 8)
    x_token = x + safe_token.to(tl.int64)[None, :] * token_stride
    x_scale_token = x_scale + safe_token.to(tl.int64) * X_GROUPS
    offset = tl.arange(0, PART)

    sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    whole = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), SUM)
    whole_x = tl.zeros((BLOCK_TOKENS,), SUM)
    # Where conversions are dear, sums of a group are bits of floats from the start.
    empty = tl.full((BLOCK_ROWS, BLOCK_TOKENS), HOLDER_BITS if FLOAT_TRICK else 0, SUM)
    part_of_sum = tl.program_id(1)
    begin, end = (0, BLOCKS) if PARTS == 1 else (part_of_sum * SHARE, tl.minimum((part_of_sum + 1) * SHARE, BLOCKS))
    if GROUP >= 128:
        # Scales are too narrow for asynchronous copies, so they are asked for one block before they are wanted.
        factor, shift = _weight_factors(scale, zero, begin * 128 // GROUP, safe_row, rows, HAS_ZERO)
    for block in tl.range(begin, end, num_stages=STAGES):
        if GROUP >= 128:
            following = tl.minimum(block + 1, BLOCKS - 1) * 128 // GROUP
            next_factor, next_shift = _weight_factors(scale, zero, following, safe_row, rows, HAS_ZERO)
            # Not a block ahead: those of two blocks do not fit beside the sums.
            x_factor = _x_factor(x_scale_token, block * 128 // GROUP, factor, X_GROUPS)
        product = empty
        product_x = tl.zeros((BLOCK_TOKENS,), SUM)
        for part in tl.static_range(0, SPAN // PART):
            channel = (block * 128 + part * PART + offset)[:, None]
            first = _tokens(x_token, channel, CHANNELS).to(DTYPE)
            if BITS == 8:
                w_first = load_bytes(w_row, block, offset[None, :], DTYPE, ASM)
                whole = _dot(w_first, first, whole, INTEGER)
                if HAS_ZERO:
                    whole_x += tl.sum(first.to(SUM), axis=0)
            else:
                second = _tokens(x_token, channel + 64, CHANNELS).to(DTYPE)
                w_first, w_second = load_weight(w_row, block, offset[None, :], part * PART, WIDTH, BITS, DTYPE, ASM)
                if GROUP == 0:
                    whole = _dot(w_second, second, _dot(w_first, first, whole, INTEGER), INTEGER)
                    if HAS_ZERO:
                        whole_x += tl.sum(first.to(SUM), axis=0) + tl.sum(second.to(SUM), axis=0)
                elif GROUP >= 128:
                    product = _dot(w_second, second, _dot(w_first, first, product, INTEGER), INTEGER)
                    if HAS_ZERO:
                        product_x += tl.sum(first.to(SUM), axis=0) + tl.sum(second.to(SUM), axis=0)
                else:
                    group = (block * 128 + part * PART) // GROUP
                    sums += _group_sums(
                        w_first, first, empty, scale, zero, x_scale_token, group, safe_row, rows,
                        FOLD, X_GROUPS, HAS_ZERO, FLOAT_TRICK, INTEGER,
                    )  # fmt: skip
                    sums += _group_sums(
                        w_second, second, empty, scale, zero, x_scale_token, group + 64 // GROUP, safe_row, rows,
                        FOLD, X_GROUPS, HAS_ZERO, FLOAT_TRICK, INTEGER,
                    )  # fmt: skip
        if GROUP >= 128:
            sums += _rescaled(product, product_x, factor, shift, x_factor, FOLD, X_GROUPS, HAS_ZERO, FLOAT_TRICK)
            factor, shift = next_factor, next_shift
        if SETTLES and GROUP == 0:
            whole = settled(whole)
    if GROUP == 0:
        factor, shift, x_factor = _factors(scale, zero, x_scale_token, 0, safe_row, rows, X_GROUPS, HAS_ZERO)
        sums = _rescaled(whole, whole_x, factor, shift, x_factor, FOLD, X_GROUPS, HAS_ZERO, False)
    sums = scaled_by_tokens(sums, x_scale, token, tokens, X_GROUPS)
    sums *= 1.0 / FOLD
    store_product(sums, y, bias, row, token, rows, tokens, part_of_sum, HAS_BIAS, PARTS)


@triton.jit
def _dot(weight, x, sums, INTEGER: tl.constexpr):
    if INTEGER:
        return tl.dot(weight, x, sums, out_dtype=tl.int32)
    else:
        return tl.dot(weight, x, sums, input_precision="ieee")


@triton.jit
def settled(sums):
    """`sums` once they are there: left open, the next step writes registers that the matrix unit still reads.

    Where only the next product uses sums of floats, Triton waits for them a step later, when the registers of the left
    operand may have been given away: with `triton.floats` products were wrong on compute capability 9.0. 10.0 keeps
    neither in registers.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [sums], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def place(rows, tokens, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, STRIP: tl.constexpr):
    """Blocks of rows and tokens of this program, STRIP blocks of rows side by side."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    strip = program // (STRIP * token_blocks)
    first = strip * STRIP
    extent = tl.minimum(row_blocks - first, STRIP)
    inside = program % (STRIP * token_blocks)
    return first + inside % extent, inside // extent


@triton.jit
def _tokens(x_token, channel, CHANNELS: tl.constexpr):
    """Activations [channels, tokens], zeros past the channels."""
    if CHANNELS % 128 == 0:
        return tl.load(x_token + channel)
    else:
        return tl.load(x_token + channel, mask=channel < CHANNELS, other=0)


@triton.jit
def _factors(scale, zero, x_scale_token, group, row, rows, X_GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Scales and zero points [rows] of a group as stored, and scales of tokens; scales again for what there is not."""
    factor, shift = _weight_factors(scale, zero, group, row, rows, HAS_ZERO)
    return factor, shift, _x_factor(x_scale_token, group, factor, X_GROUPS)


@triton.jit
def _weight_factors(scale, zero, group, row, rows, HAS_ZERO: tl.constexpr):
    """Scales and zero points [rows] of a group as stored; scales again where there are no zero points."""
    place = group * rows + row
    factor = tl.load(scale + place)
    shift = factor
    if HAS_ZERO:
        shift = tl.load(zero + place)
    return factor, shift


@triton.jit
def _x_factor(x_scale_token, group, factor, X_GROUPS: tl.constexpr):
    """Scales of tokens [tokens] for a group; `factor` where activations have no groups, and none is wanted."""
    x_factor = factor
    if X_GROUPS > 1:
        x_factor = tl.load(x_scale_token + group)
    return x_factor


@triton.jit
def _group_sums(
    weight, x, empty, scale, zero, x_scale_token, group, row, rows,
    FOLD: tl.constexpr, X_GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT_TRICK: tl.constexpr,
    INTEGER: tl.constexpr,
):  # fmt: skip
    """Sums over the channels of a group smaller than a block, rescaled."""
    factor, shift, x_factor = _factors(scale, zero, x_scale_token, group, row, rows, X_GROUPS, HAS_ZERO)
    x_sum = x_factor
    if HAS_ZERO:
        x_sum = tl.sum(x.to(empty.dtype), axis=0)
    product = _dot(weight, x, empty, INTEGER)
    return _rescaled(product, x_sum, factor, shift, x_factor, FOLD, X_GROUPS, HAS_ZERO, FLOAT_TRICK)


@triton.jit
def _rescaled(
    product, x_sum, factor, shift, x_factor,
    FOLD: tl.constexpr, X_GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT_TRICK: tl.constexpr,
):  # fmt: skip
    """Sums of one group [rows, tokens] in units of the weight, and of the activation where it has groups."""
    if HAS_ZERO:
        product -= (shift.to(tl.int32) * FOLD).to(product.dtype)[:, None] * x_sum[None, :]
    if FLOAT_TRICK:
        floats = held_floats(product)
    else:
        floats = product.to(tl.float32)
    floats *= factor.to(tl.float32)[:, None]
    if X_GROUPS > 1:
        floats *= x_factor[None, :]
    return floats


def linear_prefill(
    x: Tensor, x_scale: Tensor | None, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Product of activations with the weight, plus bias, [tokens, out_features] in `dtype`.

    Args:
        x: int8 codes [tokens, width of the weight] with zeros in the padding, or floats [tokens, in_features] that are
            not rounded; rows contiguous.
        x_scale: fp32, for codes: [1] for a static activation, [tokens, 1], or [tokens, groups of the weight with
            padding]. None for floats.
        weight: on the device of `x`.
        bias: [out_features] or None.
        dtype: of the result.
    """
    tokens, rows = x.shape[0], weight.out_features
    if tokens * rows == 0:
        return empty(x, tokens, rows, dtype=dtype)
    x_groups = -1 if x_scale is None else 0 if x_scale.dim() == 1 else x_scale.shape[1]
    assert x_groups in (-1, 0, 1, weight.groups)
    small = weight.group is not None and weight.group < LEAST_GROUP
    operand = _OPERANDS[torch.float16 if small and x.dtype == torch.int8 else x.dtype]
    architecture = tiles.architecture(x.device)
    tile = tiles.prefill_tile(architecture, operand.primitive_bitwidth, weight.bits, weight.group, tokens, rows)
    programs = -(-rows // tile.rows) * -(-tokens // tile.tokens)
    parts = tile.parts(architecture, programs, weight.width)
    y = empty(x, tokens, rows, dtype=dtype) if parts == 1 else empty(x, parts, tokens, rows, dtype=torch.float32)
    arguments = {
        "x": x,
        "x_scale": x if x_scale is None else x_scale,
        "codes": weight.codes,
        "scale": weight.scale,
        "zero": weight.scale if weight.zero_point is None else weight.zero_point,
        "bias": weight.scale if bias is None else bias,
        "y": y,
        "tokens": tokens,
        "rows": rows,
        "token_stride": x.stride(0),
        "CHANNELS": x.shape[1],
        "WIDTH": weight.width,
        "GROUP": 0 if weight.group is None else weight.group,
        "BITS": weight.bits,
        "X_GROUPS": x_groups,
        "DTYPE": operand,
        "HAS_ZERO": weight.zero_point is not None,
        "HAS_BIAS": bias is not None and parts == 1,
        "ASM": tiles.speaks_ptx(x.device),
        "FLOAT_TRICK": operand == tl.int8 and architecture < 90 and weight.zero_point is None,
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "STRIP": tile.strip,
        "STAGES": tile.stages,
        "PARTS": parts,
        "SETTLES": operand != tl.int8 and tiles.leaves_products_open(x.device),
    }
    start(prefill_kernel, (programs, parts), arguments, x.device, num_warps=tile.warps)
    return y if parts == 1 else add_parts(y, bias, dtype)
