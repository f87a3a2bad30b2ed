"""The run-time layout of a quantized weight for the Triton kernels, made once from its codes and undone without loss.

Input channels are padded to whole blocks of 128. Up to four bits, byte j of a block's 64 holds the code of channel j in
its low and that of channel j + 64 in its high nibble, in two's complement: both halves come out with one mask each and
no interleaving. Five and six bits are a row of `code >> 2` in that order, and behind it one of `code & 3`, of whose 32
bytes per block byte j holds channels j, j + 32, j + 64 and j + 96. Seven and eight bits are plain bytes.

Scales on two levels have one more row, with the steps of which they are multiples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels.levels import common_step
from optimum_qvlm.kernels.weights import QuantizedWeight
from optimum_qvlm.spec import WeightSpec

BLOCK = 128
"""Channels that are packed together."""

GROUPS = (16, 32, 64)
"""Groups smaller than a block; the others are multiples of it, or the whole row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight [out_features, in_features] as the kernels read it.

    Attributes:
        codes: int8 [out_features, width * bits / 8], where width is `in_features` rounded up to whole blocks.
        scale: [groups, out_features], floating, zero for groups that are padding only; with two levels followed by
            the step [1, out_features].
        zero_point: int8 [groups, out_features]; None on a symmetric grid.
        grid: that of the weight. One scale per row is its own step, so `group` and `two_level` say what is stored.
        in_features: channels without padding.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: WeightSpec
    in_features: int

    @property
    def bits(self) -> int:
        """4, 6 or 8, what is stored; codes of fewer bits fit as they are."""
        return stored_bits(self.grid.bits)

    @property
    def group(self) -> int | None:
        """Channels that share a scale; None shares the row."""
        return None if self.grid.groups(self.in_features) == 1 else self.grid.group

    @property
    def two_level(self) -> bool:
        """Whether there are steps, see `optimum_qvlm.kernels.levels`."""
        return self.grid.two_level and self.group is not None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """Channels with padding."""
        return padded_width(self.in_features)

    @property
    def groups(self) -> int:
        """Scales per row with padding."""
        return self.scale.shape[0] - self.two_level


def padded_width(in_features: int) -> int:
    """Channels rounded up to whole blocks."""
    return in_features + -in_features % BLOCK


def stored_bits(bits: int) -> int:
    """Bits that a code of `bits` takes: 4, 6 or 8."""
    return 4 if bits <= 4 else 6 if bits <= 6 else 8


def is_packable(bits: int, group: int | None) -> bool:
    """Whether the kernels have a layout for codes of `bits` with `group` channels to a scale."""
    if group is None:
        return 2 <= bits <= 8
    return 2 <= bits <= 6 and (group in GROUPS or (group > 0 and group % BLOCK == 0))


def pack(weight: QuantizedWeight, grid: WeightSpec) -> PackedWeight:
    """Bring codes into the kernels' order. The dtype of the scales is kept.

    Raises:
        SpecError: there is no layout for these bits and groups, or scales said to be multiples of a step are not.
    """
    codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
    channels = codes.shape[1]
    group = None if scale.shape[1] == 1 else grid.group
    if not is_packable(grid.bits, group):
        shown = f"{grid.bits} bits with group={group}"
        raise SpecError(f"{shown} have no GPU layout; use 16, 32, 64, multiples of 128 or None")
    padded = F.pad(codes, (0, -channels % BLOCK))
    stored = stored_bits(grid.bits)
    if stored == 4:
        padded = _pack_nibbles(padded)
    elif stored == 6:
        padded = torch.cat((_pack_nibbles(padded >> 2), _pack_pairs(padded)), dim=1)
    extent = 1 if group is None else -(-padded_width(channels) // group)
    scales = _by_group(scale, extent)
    if grid.two_level and group is not None:
        scales = torch.cat((scales, common_step(scale.detach()).unsqueeze(0)))
    return PackedWeight(
        codes=padded.contiguous(),
        scale=scales,
        zero_point=None if zero_point is None else _by_group(zero_point, extent),
        grid=grid,
        in_features=channels,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """Undo `pack`."""
    codes = packed.codes
    if packed.bits == 4:
        codes = _unpack_nibbles(codes)
    elif packed.bits == 6:
        half = packed.width // 2
        codes = _unpack_nibbles(codes[:, :half]) * 4 + _unpack_pairs(codes[:, half:])
    groups = packed.grid.groups(packed.in_features)
    zero = None if packed.zero_point is None else packed.zero_point[:groups].T.contiguous()
    scale = packed.scale[:groups].T.contiguous()
    return QuantizedWeight(codes[:, : packed.in_features].contiguous(), scale, zero)


def _by_group(values: Tensor, extent: int) -> Tensor:
    """[groups, rows] from [rows, groups], zeros up to `extent` groups."""
    return F.pad(values.detach(), (0, extent - values.shape[1])).T.contiguous()


def _pack_nibbles(codes: Tensor) -> Tensor:
    halves = codes.reshape(codes.shape[0], -1, 2, BLOCK // 2)
    octets: Tensor = (halves[:, :, 0] & 0xF) | (halves[:, :, 1] << 4)
    return octets.flatten(1)


def _unpack_nibbles(octets: Tensor) -> Tensor:
    blocks = octets.reshape(octets.shape[0], -1, BLOCK // 2)
    return torch.stack((blocks << 4 >> 4, blocks >> 4), dim=2).flatten(1)


def _pack_pairs(codes: Tensor) -> Tensor:
    quarters = codes.reshape(codes.shape[0], -1, 4, BLOCK // 4) & 3
    octets: Tensor = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    return octets.flatten(1)


def _unpack_pairs(octets: Tensor) -> Tensor:
    blocks = octets.reshape(octets.shape[0], -1, BLOCK // 4)
    return torch.stack([blocks >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
