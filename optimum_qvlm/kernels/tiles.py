"""Launch shapes of the Triton kernels: one static table per kernel, by architecture and number of tokens."""

from dataclasses import dataclass

import torch

OLDEST = 80
"""The oldest architecture, compute capability times ten, that the kernels are compiled for."""

DECODE_TOKENS = 64
"""Up to how many tokens an unrounded activation goes through `triton_decode`."""

DENSE_TOKENS = 512
"""From how many tokens an unrounded activation is multiplied with the dequantized weight by the vendor's library."""


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
    """The tile of `triton_decode`."""
    return DecodeTile(tokens=16, rows=16, slices=4, warps=4, stages=3)


def prefill_tile(architecture: int, bits: int, operand_bits: int, tokens: int) -> PrefillTile:
    """The tile of `triton_prefill` and `triton_float`."""
    return PrefillTile(tokens=16, rows=64, warps=4, stages=3)


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
