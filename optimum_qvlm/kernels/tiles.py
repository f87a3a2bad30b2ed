"""Launch shapes of the Triton kernels: one static table per kernel, by architecture and number of tokens."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTile:
    """Tokens and weight rows of a program, blocks of 128 channels per step (one per warp), loads in flight."""

    tokens: int
    rows: int
    slices: int
    warps: int
    stages: int


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
