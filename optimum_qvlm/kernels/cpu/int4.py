"""Four-bit weights for PyTorch's int4 product on CPUs: the fast way to decode in bf16.

The operator multiplies bf16 activations with `(code + 8 - 8) * scale + zero`, scale and zero in bf16, without rounding
the weight, and adds up in fp32; the sum is rounded to bf16. So it is the definition where scales are stored in bf16,
and is not used with others. `zero` would be `-zero_point * scale`, which bf16 cannot always hold: it holds the leading
bits, and the rest is added by a small product in fp32.

Layout. Output channels are cut into blocks of D, 64 with AVX512 and 32 with AVX2: [blocks, in_features, D / 2] bytes,
the low nibbles are the first half of the block, the high ones the second, codes unsigned. Scales are
[groups, padded out_features, 2], each followed by its zero; where there are zero points the rest of the zeros, [groups,
padded out_features], comes after all of those, in one flat tensor, and the zero points themselves are int8 [groups,
padded out_features].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.compat.torch import int4_weight_product
from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import reference
from optimum_qvlm.kernels.cpu import processor
from optimum_qvlm.kernels.weights import NOTHING, LinearGrid, QuantizedWeight, Rounding, StoredWeight

LAYOUT = "int4"

KNOWN = frozenset({"symmetric", "two_level"})

GROUPS = (32, 64, 128, 256)
"""Group sizes that the operator takes."""

BLOCKS = {"AVX512": 64, "AVX2": 32}
"""Output channels of a block by the instructions that PyTorch runs with."""

PADDING = 64
"""Output channels are padded to a multiple of this."""

OFFSET = 8
"""Codes are stored unsigned, this much higher."""

FEW_TOKENS = {True: 32, False: 48}
"""Up to how many tokens the operator is faster than dequantized slices: where the CPU multiplies bf16, where not."""

SLICE_ELEMENTS = 2**19
"""Weights that are dequantized at once, fp32: they stay in the cache until they are multiplied."""


def accepts(grid: LinearGrid, device: torch.device) -> bool:
    """Whether the operator is fast here, holds the weight as it is, and meets activations that are not rounded."""
    plain = grid.activation is None or grid.decode_tokens > 0
    holds = _holds(grid) and grid.out_features > 0
    return device.type == "cpu" and holds and plain and processor.instructions() in BLOCKS


def store(weight: QuantizedWeight, grid: LinearGrid) -> StoredWeight:
    """Codes to blocks.

    Raises:
        SpecError: the grid is none that the operator takes, or PyTorch runs with instructions that have no layout.
    """
    if not _holds(grid):
        raise SpecError(
            f"the layout {LAYOUT!r} holds 4 bits in groups of {GROUPS} with scales in bfloat16, got "
            f"{grid.weight.bits} bits in groups of {_group(grid)} with scales in {grid.scale_dtype}"
        )
    half = _block() // 2
    codes = _padded(weight.codes, grid).view(-1, 2, half, grid.in_features)
    low, high = ((codes[:, part] + OFFSET).to(torch.uint8) for part in (0, 1))
    values = (high << 4).bitwise_or_(low).transpose(1, 2).contiguous()
    scale = _padded(weight.scale, grid).T.contiguous()
    if weight.zero_point is None:
        return StoredWeight(LAYOUT, values, torch.stack([scale, torch.zeros_like(scale)], dim=-1))
    zero_point = _padded(weight.zero_point, grid).T.contiguous()
    exact = -zero_point.float() * scale.float()
    zero = exact.to(scale.dtype)
    rest = (exact - zero.float()).to(scale.dtype)
    pairs = torch.stack([scale, zero], dim=-1)
    return StoredWeight(LAYOUT, values, torch.cat([pairs.flatten(), rest.flatten()]), zero_point)


def restore(stored: StoredWeight, grid: LinearGrid) -> QuantizedWeight:
    """Blocks back to codes."""
    codes = torch.stack([stored.values & 15, stored.values >> 4], dim=1).transpose(2, 3)
    codes = codes.reshape(-1, grid.in_features)[: grid.out_features].to(torch.int8) - OFFSET
    scale = _pairs(stored, grid)[..., 0].T[: grid.out_features].contiguous()
    zero = None if stored.zero_point is None else stored.zero_point.T[: grid.out_features].contiguous()
    return QuantizedWeight(codes, scale, zero)


def linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Tensor:
    """The operator for a few bf16 tokens, else dequantized slices.

    Slices are multiplied in fp32, or in bf16 where activations are, are not rounded to a grid and the CPU is fast at
    it: then the weight is rounded to bf16 first, as that of any bf16 model is.
    """
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], grid.out_features))
    native = x.dtype == torch.bfloat16 and rounding.bits is None
    fast = processor.multiplies_bf16()
    if native and x.numel() <= FEW_TOKENS[fast] * grid.in_features:
        product = _operator(_tokens(x, rounding, grid), stored, grid)
    elif native and fast:
        product = _slices(_tokens(x, rounding, grid), stored, grid)
    else:
        product = _slices(reference.round_tokens(x, rounding).reshape(-1, grid.in_features), stored, grid)
    if product.shape[1] != grid.out_features:
        product = product[:, : grid.out_features]
    if bias is not None or product.dtype != x.dtype:
        product = reference.finish(product.float(), bias, x.dtype)
    return product.reshape(*x.shape[:-1], grid.out_features)


def bind(stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Callable[[Tensor], Tensor]:
    """`linear` with all but the activation."""
    return lambda x: linear(x, stored, bias, rounding, grid)


def _tokens(x: Tensor, rounding: Rounding, grid: LinearGrid) -> Tensor:
    """bf16 [tokens, in_features], transformed."""
    if rounding is not NOTHING:
        x = reference.transform_tokens(x, rounding.equalizer, rounding.rotation).to(x.dtype)
    return x.reshape(-1, grid.in_features).contiguous()


def _operator(x: Tensor, stored: StoredWeight, grid: LinearGrid) -> Tensor:
    """[tokens, padded out_features], bf16, or fp32 where there are zero points."""
    blocks, channels, half = stored.values.shape
    if 2 * half != _block():
        raise SpecError(
            f"the weight was put into blocks of {2 * half} output channels, PyTorch runs here with "
            f"{processor.instructions()}, which takes {_block()}; load the checkpoint again"
        )
    values = stored.values.view(blocks * half * 2, channels // 2)
    product = int4_weight_product(x, values, _group(grid), _pairs(stored, grid))
    if stored.zero_point is None:
        return product
    rest = stored.scale[-stored.zero_point.numel() :].view(stored.zero_point.shape).float()
    return torch.addmm(product.float(), x.view(x.shape[0], grid.groups, -1).sum(dim=-1, dtype=torch.float32), rest)


def _slices(x: Tensor, stored: StoredWeight, grid: LinearGrid) -> Tensor:
    """[tokens, padded out_features] in the dtype of `x` [tokens, in_features], fp32 or bf16."""
    blocks, channels, half = stored.values.shape
    scale = _halves(_pairs(stored, grid)[..., 0], half) / 16  # the nibbles are unpacked to sixteen times the code
    zero = None if stored.zero_point is None else _halves(stored.zero_point, half) * 16
    step = max(1, SLICE_ELEMENTS // (channels * half))
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, blocks, step):
        octets = stored.values[first : first + step].transpose(0, 1).reshape(channels, -1) ^ 0x88  # two's complement
        columns = slice(first * half, first * half + octets.shape[1])
        for part, nibbles in enumerate((octets << 4, octets & 0xF0)):
            weight = nibbles.view(torch.int8).float().view(grid.groups, -1, octets.shape[1])
            if zero is not None:
                weight -= zero[part, :, :, columns]
            weight *= scale[part, :, :, columns]
            parts[part].append(x @ weight.view(octets.shape).to(x.dtype))
    product = torch.stack([torch.cat(part, dim=1).view(-1, blocks, half) for part in parts], dim=2)
    return product.view(-1, blocks * 2 * half)


def _halves(columns: Tensor, half: int) -> Tensor:
    """[groups, padded out_features] to fp32 [2, groups, 1, padded out_features / 2]: channels by the half of a byte."""
    split = columns.view(columns.shape[0], -1, 2, half).permute(2, 0, 1, 3)
    return split.float().flatten(2).unsqueeze(2)


def _pairs(stored: StoredWeight, grid: LinearGrid) -> Tensor:
    """bf16 [groups, padded out_features, 2]: scales and the zeros that the operator adds."""
    if stored.zero_point is None:
        return stored.scale
    return stored.scale[: 2 * stored.zero_point.numel()].view(*stored.zero_point.shape, 2)


def _padded(matrix: Tensor, grid: LinearGrid) -> Tensor:
    """[out_features, columns] with rows of zeros up to whole blocks."""
    padded: Tensor = F.pad(matrix, (0, 0, 0, -grid.out_features % PADDING))
    return padded


def _holds(grid: LinearGrid) -> bool:
    """Whether the operator takes weights of this grid."""
    return grid.weight.bits == 4 and _group(grid) in GROUPS and grid.scale_dtype == torch.bfloat16


def _group(grid: LinearGrid) -> int:
    return grid.in_features // grid.groups


def _block() -> int:
    """Output channels of a block on this machine.

    Raises:
        SpecError: PyTorch runs with instructions that have none.
    """
    here = processor.instructions()
    if here not in BLOCKS:
        raise SpecError(f"the layout {LAYOUT!r} needs {' or '.join(BLOCKS)}, PyTorch runs here with {here}")
    return BLOCKS[here]
