"""Linear of unrounded activations with weights of up to four bits, for many tokens on devices that copy whole tiles.

Codes times scales are rounded to the dtype of the activations, in registers, tile by tile, as the left operand of the
product: a dense weight is never written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.compat.triton import described
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.epilogue import store_product
from optimum_qvlm.kernels.triton.launching import ALIGNMENT, empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.prefill import place, settled
from optimum_qvlm.kernels.triton.sums import add_parts
from optimum_qvlm.kernels.triton.unpack import scaled_nibbles

LEAST_GROUP = 64
"""Smaller ones are multiplied in more pieces than the left operand of a product is made of."""


@triton.jit
def floats_kernel(
    x, codes, scales, bias, y,
    tokens, rows,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, SETTLES: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = x (codes times scales)^T + bias.

    `x`, `codes` and `scales` are descriptors of [tokens, channels] with blocks of 64 channels, of [rows, WIDTH / 2]
    with blocks of 64 bytes, and of [groups, rows] with blocks of rows. GROUP is 64 or a multiple of 128. With more than
    one of PARTS, that many programs share the channels of a tile, and y is [PARTS, tokens, rows].
    """
    BLOCKS: tl.constexpr = WIDTH // 128
    SHARE: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    row_block, token_block = place(rows, tokens, BLOCK_ROWS, BLOCK_TOKENS, STRIP)
    first_row = row_block * BLOCK_ROWS
    first_token = token_block * BLOCK_TOKENS
    part = tl.program_id(1)
    begin, end = (0, BLOCKS) if PARTS == 1 else (part * SHARE, tl.minimum((part + 1) * SHARE, BLOCKS))
    sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    for block in tl.range(begin, end, num_stages=STAGES):
        # What becomes of the left operand has to start from loads of this step alone, or it takes a way through memory.
        first = scales.load([block * 128 // GROUP, first_row]).reshape(BLOCK_ROWS)[:, None]
        second = first
        if GROUP == 64:
            second = scales.load([block * 2 + 1, first_row]).reshape(BLOCK_ROWS)[:, None]
        packed = codes.load([first_row, block * 64])
        x_first = x.load([first_token, block * 128])
        x_second = x.load([first_token, block * 128 + 64])
        sums = tl.dot(scaled_nibbles(packed, first, 0, ASM), x_first.T, sums)
        sums = tl.dot(scaled_nibbles(packed, second, 1, ASM), x_second.T, sums)
        if SETTLES:
            sums = settled(sums)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    store_product(sums, y, bias, row, token, rows, tokens, part, HAS_BIAS, PARTS)


def takes(x: Tensor, weight: PackedWeight) -> bool:
    """Whether activations [tokens, channels] and this weight can be multiplied here."""
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.scale.dtype != x.dtype:
        return False
    if weight.bits != 4 or weight.zero_point is not None or weight.group is None or weight.group < LEAST_GROUP:
        return False
    if x.shape[0] >= tiles.DENSE_TOKENS or tiles.architecture(x.device) < tiles.BULK_COPIES:
        return False
    strides = (x.stride(0), weight.scale.stride(0))
    tensors = (x, weight.codes, weight.scale)
    return all(stride * x.element_size() % ALIGNMENT == 0 for stride in strides) and all(
        tensor.stride(1) == 1 and tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors
    )


def linear_floats(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x W^T + bias`, [tokens, out_features] in the dtype of `x`, to which the weight is rounded.

    Args:
        x: fp16 or bf16 [tokens, in_features], transformed already where the site has a transform.
        weight: up to four bits, groups of 64 channels or more with scales in the dtype of `x`, no zero points, on the
            device of `x`.
        bias: [out_features] or None.
    """
    tokens, rows = x.shape[0], weight.out_features
    if tokens * rows == 0:
        return empty(x, tokens, rows)
    architecture = tiles.architecture(x.device)
    tile = tiles.floats_tile(architecture, tokens, rows)
    programs = -(-rows // tile.rows) * -(-tokens // tile.tokens)
    parts = tile.parts(architecture, programs, weight.width)
    y = empty(x, tokens, rows) if parts == 1 else empty(x, parts, tokens, rows, dtype=torch.float32)
    arguments = {
        "x": described(x, [tile.tokens, 64]),
        "codes": described(weight.codes, [tile.rows, 64]),
        "scales": described(weight.scale, [1, tile.rows]),
        "bias": weight.scale if bias is None else bias,
        "y": y,
        "tokens": tokens,
        "rows": rows,
        "WIDTH": weight.width,
        "GROUP": weight.group,
        "HAS_BIAS": bias is not None and parts == 1,
        "ASM": tiles.speaks_ptx(x.device),
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "STRIP": tile.strip,
        "STAGES": tile.stages,
        "PARTS": parts,
        "SETTLES": tiles.leaves_products_open(x.device),
    }
    start(floats_kernel, (programs, parts), arguments, x.device, num_warps=tile.warps)
    return y if parts == 1 else add_parts(y, bias, x.dtype)
