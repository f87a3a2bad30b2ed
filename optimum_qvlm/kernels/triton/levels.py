"""Linear of int8 codes with weights of up to four bits whose scales are multiples of one step per row.

Codes times multiples are bytes, so sums stay integers to the end and are scaled once. The bytes are made in registers,
tile by tile, as the left operand of the product. Weights in groups too small for that are written whole and multiplied
by `triton.bytes`, which pays with more tokens.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.compat.triton import described
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.bytes import linear_bytes
from optimum_qvlm.kernels.triton.epilogue import scaled_by_tokens, store_product
from optimum_qvlm.kernels.triton.integers import nearest_integers
from optimum_qvlm.kernels.triton.launching import ALIGNMENT, empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.prefill import place
from optimum_qvlm.kernels.triton.unpack import multiplied_nibbles
from optimum_qvlm.spec import WeightSpec

LEAST_GROUP = 64
"""Smaller ones are multiplied in more pieces than the left operand of a product is made of."""


@triton.jit
def levels_kernel(
    x, codes, scales, x_scale, scale, bias, y,
    tokens, rows,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, X_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = (x times its scales) (codes times theirs)^T + bias. X_GROUPS 0 is one scale for all tokens.

    `x` and `codes` are descriptors of [tokens, WIDTH] and [rows, WIDTH / 2] with blocks of 64 bytes, `scales` is one of
    `scale` with blocks of rows. GROUP is 64 or a multiple of 128.
    """
    row_block, token_block = place(rows, tokens, BLOCK_ROWS, BLOCK_TOKENS, STRIP)
    first_row = row_block * BLOCK_ROWS
    first_token = token_block * BLOCK_TOKENS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    safe_row = tl.minimum(row, rows - 1)
    steps = scale + -(-WIDTH // GROUP) * rows + safe_row
    step = tl.load(steps).to(tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.int32)
    for block in tl.range(0, WIDTH // 128, num_stages=STAGES):
        # What becomes of the left operand has to start from loads of this step alone, or it takes a way through memory.
        first = multiples(scales.load([block * 128 // GROUP, first_row]).reshape(BLOCK_ROWS), step)
        second = first
        if GROUP == 64:
            second = multiples(scales.load([block * 2 + 1, first_row]).reshape(BLOCK_ROWS), step)
        packed = codes.load([first_row, block * 64])
        x_first = x.load([first_token, block * 128])
        x_second = x.load([first_token, block * 128 + 64])
        w_first, w_second = multiplied_nibbles(packed, first, second, ASM)
        sums = tl.dot(w_first, x_first.T, sums, out_dtype=tl.int32)
        sums = tl.dot(w_second, x_second.T, sums, out_dtype=tl.int32)
    values = sums.to(tl.float32) * tl.load(steps).to(tl.float32)[:, None]
    values = scaled_by_tokens(values, x_scale, token, tokens, X_GROUPS)
    store_product(values, y, bias, row, token, rows, tokens, 0, HAS_BIAS)


@triton.jit
def multiples(scale, step):
    """How many steps a scale is, int32 [rows, 1]: the quotient is a whole number, up to how it was computed."""
    return nearest_integers(scale.to(tl.float32) / step)[:, None]


@triton.jit
def write_bytes_kernel(
    codes, scale, out,
    rows,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out int8 [rows, WIDTH] of codes times multiples; one program per block of 128 channels and block of rows."""
    BLOCKS: tl.constexpr = WIDTH // 128
    PART: tl.constexpr = GROUP if GROUP < 64 else 64
    program = tl.program_id(0)
    block = program % BLOCKS
    row = program // BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe_row = tl.minimum(row, rows - 1)
    step = tl.load(scale + -(-WIDTH // GROUP) * rows + safe_row).to(tl.float32)
    offset = tl.arange(0, PART)
    # Rows times channels pass 2**31 in large vocabularies.
    source = codes + safe_row.to(tl.int64)[:, None] * (WIDTH // 2) + block * 64 + offset[None, :]
    target = out + row.to(tl.int64)[:, None] * WIDTH + block * 128 + offset[None, :]
    for part in tl.static_range(0, 64 // PART):
        channel = block * 128 + part * PART
        first = tl.load(scale + channel // GROUP * rows + safe_row)
        second = tl.load(scale + (channel + 64) // GROUP * rows + safe_row)
        packed = tl.load(source + part * PART)
        low, high = multiplied_nibbles(packed, multiples(first, step), multiples(second, step), ASM)
        tl.store(target + part * PART, low, mask=(row < rows)[:, None])
        tl.store(target + part * PART + 64, high, mask=(row < rows)[:, None])


def takes(x: Tensor, x_scale: Tensor, weight: PackedWeight) -> bool:
    """Whether codes [tokens, width] with these scales are multiplied here."""
    if not weight.two_level or x.dtype != torch.int8 or (x_scale.dim() == 2 and x_scale.shape[1] != 1):
        return False
    least = tiles.LEVELS_TOKENS if fits_registers(weight) else tiles.WRITTEN_TOKENS
    if x.shape[0] < least or tiles.architecture(x.device) < tiles.BULK_COPIES:
        return False
    return all(t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0 for t in (x, weight.codes))


def fits_registers(weight: PackedWeight) -> bool:
    """Whether `linear_in_registers` takes this weight: no group is smaller than a tile, and scales can be copied."""
    assert weight.group is not None
    aligned = weight.scale.stride(0) * weight.scale.element_size() % ALIGNMENT == 0
    return weight.group >= LEAST_GROUP and aligned and weight.scale.data_ptr() % ALIGNMENT == 0


def linear_levels(x: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Product of activations with the weight, plus bias, [tokens, out_features] in `dtype`.

    Args:
        x: int8 codes [tokens, width of the weight], contiguous, with zeros in the padding.
        x_scale: fp32 [1] for a static activation, or [tokens, 1].
        weight: up to four bits, scales on two levels, on the device of `x`.
        bias: [out_features] or None.
        dtype: of the result.
    """
    if fits_registers(weight):
        return linear_in_registers(x, x_scale, weight, bias, dtype)
    return linear_bytes(x, x_scale, written(weight), bias, dtype)


def linear_in_registers(
    x: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same without writing the weight, where `fits_registers` says so."""
    tokens, rows = x.shape[0], weight.out_features
    y = empty(x, tokens, rows, dtype=dtype)
    if y.numel() == 0:
        return y
    tile = tiles.levels_tile(tiles.architecture(x.device), tokens, rows)
    arguments = {
        "x": described(x, [tile.tokens, 64]),
        "codes": described(weight.codes, [tile.rows, 64]),
        "scales": described(weight.scale, [1, tile.rows]),
        "x_scale": x_scale,
        "scale": weight.scale,
        "bias": weight.scale if bias is None else bias,
        "y": y,
        "tokens": tokens,
        "rows": rows,
        "WIDTH": weight.width,
        "GROUP": weight.group,
        "X_GROUPS": 0 if x_scale.dim() == 1 else 1,
        "HAS_BIAS": bias is not None,
        "ASM": tiles.speaks_ptx(x.device),
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "STRIP": tile.strip,
        "STAGES": tile.stages,
    }
    grid = (-(-rows // tile.rows) * -(-tokens // tile.tokens),)
    start(levels_kernel, grid, arguments, x.device, num_warps=tile.warps)
    return y


def written(weight: PackedWeight) -> PackedWeight:
    """The same weight in eight bits, with one scale per row."""
    rows = weight.out_features
    out = empty(weight.codes, rows, weight.width)
    if out.numel() > 0:
        block_rows = 64
        arguments = {
            "codes": weight.codes,
            "scale": weight.scale,
            "out": out,
            "rows": rows,
            "WIDTH": weight.width,
            "GROUP": weight.group,
            "ASM": tiles.speaks_ptx(out.device),
            "BLOCK_ROWS": block_rows,
        }
        grid = (-(-rows // block_rows) * (weight.width // 128),)
        start(write_bytes_kernel, grid, arguments, out.device, num_warps=4)
    return dataclasses.replace(weight, codes=out, scale=weight.scale[-1:], grid=WeightSpec(bits=8))
