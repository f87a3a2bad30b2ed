"""What all products end with: scales of tokens, the bias, and the result in its place.

Tiles are [rows, tokens]. TOKENS_FIRST says that one is [tokens, rows].
"""

import triton
import triton.language as tl


@triton.jit
def scaled_by_tokens(values, x_scale, token, tokens, X_GROUPS: tl.constexpr, TOKENS_FIRST: tl.constexpr = False):
    """A tile of fp32 times `x_scale`: with X_GROUPS 1 one for each token, with 0 one for all, else none."""
    if X_GROUPS == 1:
        # Tokens times anything pass 2**31 in long batches.
        factor = tl.load(x_scale + tl.minimum(token, tokens - 1).to(tl.int64))
        values *= factor[:, None] if TOKENS_FIRST else factor[None, :]
    elif X_GROUPS == 0:
        values *= tl.load(x_scale)
    return values


@triton.jit
def store_product(
    values, y, bias, row, token, rows, tokens, part,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr = 1, TOKENS_FIRST: tl.constexpr = False,
):  # fmt: skip
    """Write a tile of fp32 of rows `row` and tokens `token`, plus bias, to y [tokens, rows] in the dtype of `y`.

    With more than one of PARTS, y is [PARTS, tokens, rows], of which this is `part`.
    """
    if HAS_BIAS:
        shift = tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)
        values += shift[None, :] if TOKENS_FIRST else shift[:, None]
    if TOKENS_FIRST:
        row, token = row[None, :], token[:, None]
    else:
        row, token = row[:, None], token[None, :]
    # Tokens times rows pass 2**31 in large vocabularies.
    place = y + token.to(tl.int64) * rows + row
    if PARTS > 1:
        place += part.to(tl.int64) * tokens * rows
    tl.store(place, values.to(y.dtype.element_ty), mask=(row < rows) & (token < tokens))
