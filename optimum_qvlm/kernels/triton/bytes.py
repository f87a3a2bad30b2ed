"""Linear of int8 codes with an int8 weight of one scale per row, for many tokens on devices that copy whole tiles.

Both operands go to shared memory as they lie, by the bulk copies of compute capability 9.0 and newer, which take the
place of the addresses that `triton.prefill` computes for every element. Sums are int32 to the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.compat.triton import described
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.epilogue import scaled_by_tokens, store_product
from optimum_qvlm.kernels.triton.launching import ALIGNMENT, empty, start
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.kernels.triton.prefill import place

LEAST_TOKENS = 257
"""With fewer, copies of tiles start too late to pay."""

LEAST_ARCHITECTURE = tiles.BULK_COPIES


@triton.jit
def bytes_kernel(
    x, codes, x_scale, scale, bias, y,
    tokens, rows,
    WIDTH: tl.constexpr, X_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = (x times its scales) (codes times theirs)^T + bias. X_GROUPS 0 is one scale for all tokens.

    `x` and `codes` are descriptors of [tokens, WIDTH] and [rows, WIDTH] with blocks of 128 channels.
    """
    row_block, token_block = place(rows, tokens, BLOCK_ROWS, BLOCK_TOKENS, STRIP)
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.int32)
    for block in tl.range(0, WIDTH // 128, num_stages=STAGES):
        tile = x.load([token_block * BLOCK_TOKENS, block * 128])
        weight = codes.load([row_block * BLOCK_ROWS, block * 128])
        sums = tl.dot(tile, weight.T, sums, out_dtype=tl.int32)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    values = sums.to(tl.float32) * tl.load(scale + tl.minimum(row, rows - 1)).to(tl.float32)[None, :]
    values = scaled_by_tokens(values, x_scale, token, tokens, X_GROUPS, TOKENS_FIRST=True)
    store_product(values, y, bias, row, token, rows, tokens, 0, HAS_BIAS, TOKENS_FIRST=True)


def takes(x: Tensor, weight: PackedWeight) -> bool:
    """Whether codes [tokens, width] and this weight can be multiplied here."""
    if weight.bits != 8 or weight.group is not None or weight.zero_point is not None or x.dtype != torch.int8:
        return False
    if x.shape[0] < LEAST_TOKENS or tiles.architecture(x.device) < LEAST_ARCHITECTURE:
        return False
    return all(t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0 for t in (x, weight.codes))


def linear_bytes(x: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Product of activations with the weight, plus bias, [tokens, out_features] in `dtype`.

    Args:
        x: int8 codes [tokens, width of the weight], contiguous, with zeros in the padding.
        x_scale: fp32 [1] for a static activation, or [tokens, 1].
        weight: 8 bits, one scale per row, no zero points, on the device of `x`.
        bias: [out_features] or None.
        dtype: of the result.
    """
    tokens, rows = x.shape[0], weight.out_features
    y = empty(x, tokens, rows, dtype=dtype)
    if y.numel() == 0:
        return y
    tile = tiles.bytes_tile(tiles.architecture(x.device), tokens, rows)
    arguments = {
        "x": described(x, [tile.tokens, 128]),
        "codes": described(weight.codes, [tile.rows, 128]),
        "x_scale": x_scale,
        "scale": weight.scale,
        "bias": weight.scale if bias is None else bias,
        "y": y,
        "tokens": tokens,
        "rows": rows,
        "WIDTH": weight.width,
        "X_GROUPS": 0 if x_scale.dim() == 1 else 1,
        "HAS_BIAS": bias is not None,
        "BLOCK_TOKENS": tile.tokens,
        "BLOCK_ROWS": tile.rows,
        "STRIP": tile.strip,
        "STAGES": tile.stages,
    }
    grid = (-(-rows // tile.rows) * -(-tokens // tile.tokens),)
    start(bytes_kernel, grid, arguments, x.device, num_warps=tile.warps)
    return y
