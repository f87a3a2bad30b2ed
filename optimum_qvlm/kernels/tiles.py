"""Launch shapes of the Triton kernels: one static table per kernel, by architecture and number of tokens."""

from dataclasses import dataclass

import torch

OLDEST = 80
"""The oldest architecture, compute capability times ten, that the kernels are compiled for."""

DECODE_TOKENS = 32
"""Up to how many tokens an unrounded activation goes through `triton_decode`."""

DENSE_TOKENS = 512
"""From how many tokens an unrounded activation is multiplied with the dequantized weight by the vendor's library."""


MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}
"""Of the largest device of an architecture."""

ROOMY = (90, 100)
"""Architectures with 227 KiB of shared memory for a program."""

DECODE_BUCKETS = (8, 16, 32)
"""Tokens of a program of `triton_decode`; more take several programs."""

DECODE_ROWS = {8: (16, 32), 16: (16, 32), 32: (16, 16)}
"""Weight rows of a program by bucket: where a weight has few rows, and where it has many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTile:
    """Tokens and weight rows of a program, blocks of 128 channels per step (one per warp), loads in flight."""

    tokens: int
    rows: int
    slices: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTile:
    """Tokens and weight rows of a program, blocks of rows side by side, loads in flight."""

    tokens: int
    rows: int
    warps: int
    stages: int
    strip: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeTile:
    """Channels of a program's step, and the power of two at or above it that it holds."""

    span: int
    chunk: int
    warps: int


def architecture(device: torch.device) -> int:
    """Compute capability times ten; 80 for what is not a CUDA device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def speaks_ptx(device: torch.device) -> bool:
    """Whether inline PTX may be used: on NVIDIA's devices."""
    return device.type == "cuda" and torch.version.hip is None


def decode_tile(architecture: int, bits: int, tokens: int, rows: int) -> DecodeTile:
    """The tile of `triton_decode`: fewer rows where the weight would not give every multiprocessor two programs."""
    bucket = next(count for count in DECODE_BUCKETS if tokens <= count or count == DECODE_BUCKETS[-1])
    few_rows, many_rows = DECODE_ROWS[bucket]
    programs = 2 * MULTIPROCESSORS.get(architecture, 108)
    height = many_rows if rows >= programs * many_rows else few_rows
    return DecodeTile(tokens=bucket, rows=height, slices=4, warps=4, stages=2 if bits > 4 and bucket > 16 else 3)


def prefill_tile(architecture: int, operand_bits: int, weight_bits: int, group: int | None, tokens: int) -> PrefillTile:
    """The tile of `triton_prefill` for operands of 8, 16 or 32 bits; small groups need room for more sums."""
    if operand_bits == 32:
        return PrefillTile(tokens=16, rows=64, warps=4, stages=2)
    if tokens <= 16:
        return PrefillTile(tokens=16, rows=64, warps=4, stages=4)
    if tokens <= 32:
        return PrefillTile(tokens=32, rows=64, warps=4, stages=4)
    if tokens <= 64 or (group is not None and group < 128):
        return PrefillTile(tokens=64, rows=128, warps=8, stages=3)
    wide = architecture in ROOMY and operand_bits == weight_bits == 8 and tokens >= 1024
    return PrefillTile(tokens=256 if wide else 128, rows=128, warps=8, stages=3)


def quantize_tile(width: int, group: int | None, rotation: int | None, *, whole: bool) -> QuantizeTile:
    """The tile of `triton_quantize`: a rotation takes at least the sixteen rows of a matrix instruction."""
    least = max(128, 16 * (rotation or 1))
    if group is not None and _power_of_two(group) != group:
        chunk = max(least, _power_of_two(group))
        return QuantizeTile(span=group, chunk=chunk, warps=8)
    most = max(least, group or 1, 4096 if whole and rotation is None else 2048)
    chunk = min(most, max(least, group or 1, _power_of_two(width)))
    return QuantizeTile(span=chunk, chunk=chunk, warps=4 if chunk < 2048 else 8)


def _power_of_two(count: int) -> int:
    """The smallest power of two at or above `count`."""
    return 1 << (count - 1).bit_length()
