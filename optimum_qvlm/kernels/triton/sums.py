"""The sum of a product's parts, where programs have shared its reduction axis.

Parts are added in their order: no atomics, and the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_qvlm.kernels.triton.launching import empty, start

ROWS = 256
"""Of a program."""


@triton.jit
def sums_kernel(
    parts, bias, y,
    rows,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """y [tokens, rows] = sum of parts [PARTS, tokens, rows] + bias; one program per block of rows and token."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    # Tokens times rows pass 2**31 in large vocabularies.
    place = tl.program_id(1).to(tl.int64) * rows + row
    size = tl.num_programs(1).to(tl.int64) * rows
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for part in tl.static_range(0, PARTS):
        total += tl.load(parts + part * size + place, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def add_parts(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum of `parts` [parts, tokens, out_features] in fp32, plus `bias` [out_features], in `dtype`."""
    count, tokens, rows = parts.shape
    y = empty(parts, tokens, rows, dtype=dtype)
    arguments = {
        "parts": parts,
        "bias": parts if bias is None else bias,
        "y": y,
        "rows": rows,
        "PARTS": count,
        "HAS_BIAS": bias is not None,
        "BLOCK_ROWS": ROWS,
    }
    start(sums_kernel, (-(-rows // ROWS), tokens), arguments, parts.device, num_warps=2)
    return y
