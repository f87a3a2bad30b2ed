"""Weights as tables for FBGEMM's embedding-bag operators, which PyTorch carries: fast fp32 products on any CPU.

A product with a few tokens is a sum of weight columns, each times one number of the token: what an embedding bag with
per-sample weights computes, straight from 2-, 4- or 8-bit tables. One bag per token and group of input channels gives
sums that only lack their scale. The operators take fp32 activations and any group, and add up in fp32.

Layout. Output channels are cut into blocks of D, input channels are the rows: [blocks, in_features, D] codes, each row
followed by the scale and bias that the operators apply (1 and what undoes the offset of unsigned codes). Codes wider
than one table take two: six bits are a table of the low four and one of the high two. Where there is one, field f of
its bytes holds the f-th part of the channels of a block, so that it unpacks without interleaving; scales
[blocks, groups, D] lie in the order in which the operators return channels.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.kernels import reference
from optimum_qvlm.kernels.weights import NOTHING, LinearGrid, QuantizedWeight, Rounding, StoredWeight

LAYOUT = "table"

KNOWN = frozenset({"symmetric", "two_level"})

PLANES = {2: (2,), 4: (4,), 6: (4, 2), 8: (8,)}
"""Bits of the tables that hold a code, lowest first."""

BLOCKS = (128, 96, 64, 32)
"""Output channels per block: rows must be long enough to pay for their scale and bias, short enough for the cache."""

BAG_TOKENS = 8
"""Up to this many tokens bags are faster than dequantizing once; both compute the same. Measured on AVX2."""

SLICE_ELEMENTS = 2**19
"""Weights that are dequantized at once, fp32: they stay in the cache until they are multiplied."""


def accepts(grid: LinearGrid, device: torch.device) -> bool:
    """Whether this layout holds the weight."""
    return device.type == "cpu" and grid.weight.bits in PLANES and grid.in_features > 0 and grid.out_features > 0


def store(weight: QuantizedWeight, grid: LinearGrid) -> StoredWeight:
    """Codes to tables."""
    offset = 2 ** (grid.weight.bits - 1)
    unsigned = _blocks(weight.codes, grid, fill=-offset).to(torch.int16).add_(offset).to(torch.uint8)
    tables: list[Tensor] = []
    shift = 0
    for bits in PLANES[grid.weight.bits]:
        plane = (unsigned >> shift) & (2**bits - 1)
        tail = _tail(bits, 2.0**shift, -float(offset) if shift == 0 else 0.0)
        tables.append(torch.cat([_merge(plane, bits, grid), tail.expand(*plane.shape[:2], -1)], dim=-1).flatten())
        shift += bits
    values = torch.cat(tables)
    zero = None if weight.zero_point is None else _interleave(_blocks(weight.zero_point, grid), grid)
    return StoredWeight(LAYOUT, values, _interleave(_blocks(weight.scale, grid), grid), zero)


def restore(stored: StoredWeight, grid: LinearGrid) -> QuantizedWeight:
    """Tables back to codes."""
    codes = _codes(stored, grid, 0, stored.scale.shape[0])
    zero = None if stored.zero_point is None else _unblocks(_order(stored.zero_point, grid), grid)
    return QuantizedWeight(_unblocks(codes, grid), _unblocks(_order(stored.scale, grid), grid), zero)


def linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Tensor:
    """Product in fp32 by bags or by dequantized slices, whichever is faster for the number of tokens."""
    rounded = x if x.dtype == torch.float32 and rounding is NOTHING else reference.round_tokens(x, rounding)
    tokens = x.numel() // grid.in_features
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], grid.out_features))
    product = _bags(rounded, tokens, stored, grid) if tokens <= BAG_TOKENS else _slices(rounded, stored, grid)
    padded = product.shape[1] != grid.out_features
    product = product[:, : grid.out_features] if padded else product
    return reference.finish(product, bias, x.dtype).view(*x.shape[:-1], grid.out_features)


def bind(stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Callable[[Tensor], Tensor]:
    """`linear` with all but the activation."""
    return lambda x: linear(x, stored, bias, rounding, grid)


def _bags(x: Tensor, tokens: int, stored: StoredWeight, grid: LinearGrid) -> Tensor:
    """fp32 [tokens, padded out_features] from a few tokens.

    A call takes a few microseconds, which is much beside the product of a small layer: no more of them than needed.
    """
    scale = stored.scale
    blocks, groups, size = scale.shape
    channels, fields = grid.in_features, _fields(grid)
    rows, starts = _bag_indices(blocks, tokens, channels, channels // groups)
    factors = x.reshape(tokens, channels).expand(blocks, tokens, channels).reshape(-1)
    sums: Tensor | None = None
    for bits, table in _tables(stored, grid):
        part = _BAGS[bits](table, rows, starts, False, 0, False, factors, None, False)
        sums = part if sums is None else sums.add_(part)
    assert sums is not None
    if tokens > 1 or stored.zero_point is not None:
        sums = sums.view(blocks, tokens, groups, size)
        if stored.zero_point is not None:
            sums -= stored.zero_point.unsqueeze(1) * x.reshape(tokens, groups, -1).sum(dim=-1, keepdim=True)
        scale = scale.unsqueeze(1)
    else:
        sums = sums.view(scale.shape)
    sums.mul_(scale)
    if groups > 1:
        sums = sums.sum(dim=-2)
    if fields > 1:
        sums = sums.view(blocks, tokens, size // fields, fields).permute(1, 0, 3, 2)
    elif tokens > 1:
        sums = sums.view(blocks, tokens, size).transpose(0, 1)
    return sums.reshape(tokens, blocks * size)


@lru_cache(maxsize=64)
def _bag_indices(blocks: int, tokens: int, channels: int, group: int) -> tuple[Tensor, Tensor]:
    """Row of every factor, and where the bags start: the same for all weights of a size, so made once."""
    rows = torch.arange(blocks * channels, dtype=torch.int32, device="cpu").view(blocks, 1, channels)
    starts = torch.arange(0, blocks * tokens * channels, group, dtype=torch.int32, device="cpu")
    return rows.expand(blocks, tokens, channels).reshape(-1), starts


def _slices(x: Tensor, stored: StoredWeight, grid: LinearGrid) -> Tensor:
    """fp32 [tokens, padded out_features] from many tokens."""
    x = x.reshape(-1, grid.in_features)
    blocks, groups, size = stored.scale.shape
    scale = _order(stored.scale, grid).float().unsqueeze(2)
    zero = None if stored.zero_point is None else _order(stored.zero_point, grid).unsqueeze(2)
    step = max(1, SLICE_ELEMENTS // (grid.in_features * size))
    parts = []
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        weight = _codes(stored, grid, first, last).float().view(last - first, groups, -1, size)
        if zero is not None:
            weight -= zero[first:last]
        weight *= scale[first:last]
        parts.append(torch.bmm(x.expand(last - first, *x.shape), weight.view(last - first, -1, size)))
    product: Tensor = torch.cat(parts).transpose(0, 1).reshape(x.shape[0], blocks * size)
    return product


def _codes(stored: StoredWeight, grid: LinearGrid, first: int, last: int) -> Tensor:
    """int8 codes [last - first, in_features, D] of some blocks, channels in their order."""
    size, offset = stored.scale.shape[2], 2 ** (grid.weight.bits - 1)
    if grid.weight.bits == 8:
        table: Tensor = _tables(stored, grid)[0][1]
        signed: Tensor = table.view(-1, grid.in_features, table.shape[1])[first:last, :, :size] ^ offset
        return signed.view(torch.int8)
    whole, shift = None, 0
    for bits, table in _tables(stored, grid):
        octets = table.view(-1, grid.in_features, table.shape[1])[first:last, :, : size * bits // 8]
        fields = [octets >> low & (2**bits - 1) for low in range(0, 8, bits)]
        plane = torch.cat(fields, dim=-1) if _fields(grid) > 1 else torch.stack(fields, dim=-1).flatten(-2)
        whole = plane if whole is None else whole | plane << shift
        shift += bits
    assert whole is not None
    codes: Tensor = whole.view(torch.int8) - offset
    return codes


def _tables(stored: StoredWeight, grid: LinearGrid) -> list[tuple[int, Tensor]]:
    """Bits and uint8 [blocks * in_features, bytes of a row] of every plane."""
    blocks, _, size = stored.scale.shape
    rows, planes = blocks * grid.in_features, PLANES[grid.weight.bits]
    if len(planes) == 1:
        return [(grid.weight.bits, stored.values.view(rows, -1))]
    widths = [size * bits // 8 + _TAIL_BYTES[bits] for bits in planes]
    parts = stored.values.split([rows * width for width in widths])
    return [(bits, part.view(rows, -1)) for bits, part in zip(planes, parts, strict=True)]


def _tail(bits: int, scale: float, bias: float) -> Tensor:
    """The bytes after a row: two floats, in fp16 where the table is narrower than a byte."""
    dtype = torch.float32 if bits == 8 else torch.float16
    return torch.tensor([scale, bias], dtype=dtype, device="cpu").view(torch.uint8)


def _block(out_features: int) -> int:
    """The size of block that pads least, the largest of those."""
    return min(BLOCKS, key=lambda size: (-out_features % size, -size))


def _blocks(matrix: Tensor, grid: LinearGrid, fill: int = 0) -> Tensor:
    """[out_features, columns] to [blocks, columns, D], padded with `fill`."""
    size = _block(grid.out_features)
    padded: Tensor = F.pad(matrix, (0, 0, 0, -grid.out_features % size), value=fill)
    return padded.view(-1, size, matrix.shape[1]).transpose(1, 2)


def _unblocks(blocks: Tensor, grid: LinearGrid) -> Tensor:
    """Undo `_blocks`."""
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[: grid.out_features].contiguous()


def _merge(plane: Tensor, bits: int, grid: LinearGrid) -> Tensor:
    """uint8 values [..., D] to bytes [..., D * bits / 8]."""
    fields = 8 // bits
    split: Tensor = plane.unflatten(-1, (fields, -1)) if _fields(grid) > 1 else plane.unflatten(-1, (-1, fields)).mT
    merged = split[..., 0, :].clone()
    for field in range(1, fields):
        merged |= split[..., field, :] << field * bits
    return merged


def _fields(grid: LinearGrid) -> int:
    """Parts of the channels of a block that share bytes; 1 where channels lie in their own order."""
    return 8 // grid.weight.bits if len(PLANES[grid.weight.bits]) == 1 else 1


def _interleave(blocks: Tensor, grid: LinearGrid) -> Tensor:
    """[..., D] from the order of the channels to that in which the operators return them."""
    mixed: Tensor = blocks.unflatten(-1, (_fields(grid), -1)).mT.flatten(-2)
    return mixed.contiguous()


def _order(blocks: Tensor, grid: LinearGrid) -> Tensor:
    """Undo `_interleave`."""
    fields = _fields(grid)
    return blocks.view(*blocks.shape[:-1], -1, fields).mT.reshape(blocks.shape)


_BAGS = {
    2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets.default,
    4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets.default,
    8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default,
}

_TAIL_BYTES = {2: 4, 4: 4, 8: 8}
"""Bytes after a row: two floats, fp32 in tables of bytes and fp16 in narrower ones."""
