"""Eight-bit weights as plain int8 rows, for CPUs that multiply bytes exactly (VNNI).

Products of rounded activations are integer products, exact in int32. Older instructions add pairs of products in 16
bits and saturate, so that PyTorch falls back to a loop there: such CPUs use `cpu.table`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from optimum_qvlm.compat.torch import byte_product, int8_weight_product
from optimum_qvlm.kernels import reference
from optimum_qvlm.kernels.weights import LinearGrid, QuantizedWeight, Rounding, StoredWeight

LAYOUT = "rows"

KNOWN = frozenset({"symmetric", "two_level"})


def accepts(grid: LinearGrid, device: torch.device) -> bool:
    """Whether integer products are fast here and every call can use them.

    Up to `decode_tokens` the activations are not integers; then only bf16 has a fast product with int8 weights.
    """
    rounded = grid.activation is not None and grid.activation.group is None
    whole = grid.weight.bits == 8 and grid.groups == 1 and rounded
    few = grid.decode_tokens == 0 or (grid.scale_dtype == torch.bfloat16 and grid.weight.symmetric)
    sizes = grid.in_features % 32 == 0 and grid.out_features % 8 == 0  # PyTorch's bf16 product reads past others
    return device.type == "cpu" and whole and few and sizes and _multiplies_bytes()


def store(weight: QuantizedWeight, grid: LinearGrid) -> StoredWeight:
    """Codes as they are."""
    return StoredWeight(LAYOUT, weight.codes.contiguous(), weight.scale, weight.zero_point)


def restore(stored: StoredWeight, grid: LinearGrid) -> QuantizedWeight:
    """Undo `store`."""
    return QuantizedWeight(stored.values, stored.scale, stored.zero_point)


def linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Tensor:
    """Integer product of rounded activations, else the product with int8 weights in bf16, else the definition."""
    if rounding.bits is not None and x.numel() > 0:
        return reference.finish(_integers(x, stored, rounding), bias, x.dtype)
    if x.dtype == stored.scale.dtype == torch.bfloat16 and x.numel() > 0 and stored.zero_point is None:
        tokens = reference.transform_tokens(x, rounding.equalizer, rounding.rotation).to(x.dtype)
        product = int8_weight_product(tokens.reshape(-1, grid.in_features), stored.values, stored.scale[:, 0])
        return reference.finish(product.float(), bias, x.dtype).reshape(*x.shape[:-1], grid.out_features)
    return reference.linear(x, restore(stored, grid), bias, rounding)


def bind(stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Callable[[Tensor], Tensor]:
    """`linear` with all but the activation."""
    return lambda x: linear(x, stored, bias, rounding, grid)


def _integers(x: Tensor, stored: StoredWeight, rounding: Rounding) -> Tensor:
    """fp32 [..., out_features]."""
    codes, scale = reference.quantize(x, rounding)
    flat = codes.reshape(-1, codes.shape[-1])
    sums = _byte_sums(flat, stored.values)
    if stored.zero_point is not None:
        sums -= flat.sum(dim=1, keepdim=True, dtype=torch.int32) * stored.zero_point.T.int()
    weighted: Tensor = (sums.float() * stored.scale.T.float()).reshape(*x.shape[:-1], -1) * scale
    return weighted


def _byte_sums(codes: Tensor, values: Tensor) -> Tensor:
    """int32 [tokens, rows] of `codes` [tokens, channels] and `values` [rows, channels], exact."""
    if _byte_products_are_exact():
        return byte_product(codes, values.t())
    return (codes.double() @ values.t().double()).to(torch.int32)


def _multiplies_bytes() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False)) and _byte_products_are_exact()


@cache
def _byte_products_are_exact() -> bool:
    """Whether the library behind PyTorch sums byte products without saturating.

    With `ONEDNN_MAX_CPU_ISA` below what the CPU has, PyTorch still calls oneDNN, whose older instructions saturate.
    """
    codes = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
    return bool((byte_product(codes, codes[:8].t()) == 64 * 127 * 127).all())
