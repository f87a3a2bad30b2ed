"""What a weight or an activation is quantized to. Values only; no tensors here."""

import re
from dataclasses import dataclass
from typing import Literal

from optimum_qvlm.errors import SpecError

GroupSize = int | Literal["auto"] | None

AUTO_GROUPS = (128, 64, 32, 16)
"""Group sizes that `"auto"` tries, in this order."""

TWO_LEVEL_BITS = 4
"""The most bits of codes that may be multiplied by the multiples of `optimum_qvlm.kernels.levels` and fit a byte."""

FITTED_BITS = 5
"""The most bits of activations whose scales are fitted: where there are more codes, next to nothing is gained."""

NAMED_SCHEMES = ("w4a16", "w4a8", "w4a4", "w6a6", "w8a8")
"""Schemes that the documentation names; any `w<2..8>a<2..8 or 16>` is accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """Integer grid for one weight [out_features, in_features].

    `group` counts input channels that share a scale; None shares the whole row. With `symmetric` the grid is
    centred on zero and needs no zero point. With `two_level` the scales of a row are whole multiples, 1 to 15, of one
    step.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    two_level: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"weight bits must lie in 2..8, got {self.bits}")
        if self.group is not None and self.group < 1:
            raise SpecError(f"group must be positive or None, got {self.group}")
        if self.two_level and (not self.symmetric or self.bits > TWO_LEVEL_BITS):
            grid = f"{self.bits} bits{'' if self.symmetric else ' and zero points'}"
            raise SpecError(f"two-level scales are for symmetric grids of at most {TWO_LEVEL_BITS} bits, got {grid}")

    def groups(self, in_features: int) -> int:
        """Number of scales per row."""
        return 1 if self.group is None else in_features // self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSpec:
    """Grid around zero for one activation [tokens, channels].

    A dynamic grid takes its scale from each input: `group` counts channels of a token that share it, None shares the
    whole token. A `fitted` one chooses sign and size of each scale by the error, see
    `optimum_qvlm.kernels.quantize_tokens`. A `static` one has a single scale, found once in calibration.
    """

    bits: int
    group: int | None = None
    static: bool = False
    fitted: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"activation bits must lie in 2..8 (16 means not quantized), got {self.bits}")
        if self.group is not None and self.group < 1:
            raise SpecError(f"group must be positive or None, got {self.group}")
        if self.static and self.group is not None:
            raise SpecError(f"a static activation has one scale, got group={self.group}")
        if self.static and self.fitted:
            raise SpecError(
                "the scale of a static activation is that of the calibration, so it cannot be fitted as well"
            )


@dataclass(frozen=True, slots=True)
class Scheme:
    """Bits of weights and activations; `activation_bits` None leaves activations in floating point."""

    weight_bits: int
    activation_bits: int | None

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read `"w4a8"` and its like.

        Raises:
            SpecError: for anything that is not `w<2..8>a<2..8 or 16>`.
        """
        match = re.fullmatch(r"w([2-8])a([2-8]|16)", text) if isinstance(text, str) else None
        if match is None:
            raise SpecError(
                f"unknown scheme {text!r}; use one of {', '.join(NAMED_SCHEMES)}, "
                "or w<bits>a<bits> with 2..8 bits for weights and 2..8 or 16 for activations"
            )
        activation = int(match[2])
        return cls(int(match[1]), None if activation == 16 else activation)

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits or 16}"

    def weight_spec(self, in_features: int, group_size: GroupSize, *, symmetric: bool) -> WeightSpec:
        """The weight grid of a linear with `in_features` inputs.

        Eight bits are always per row. Below, `"auto"` takes the largest of 128, 64, 32 and 16 that divides
        `in_features`, else the whole row; None is the whole row.

        Raises:
            SpecError: an explicit group does not divide `in_features`.
        """
        if self.weight_bits == 8 or group_size is None:
            return WeightSpec(bits=self.weight_bits, symmetric=symmetric)
        if group_size == "auto":
            group = next((g for g in AUTO_GROUPS if in_features % g == 0), None)
            return WeightSpec(bits=self.weight_bits, group=group, symmetric=symmetric)
        if in_features % group_size != 0:
            fitting = [str(g) for g in AUTO_GROUPS if in_features % g == 0]
            choices = ", ".join([*fitting, '"auto"']) + " or None"
            raise SpecError(f"group={group_size} does not divide in_features={in_features}; use {choices}")
        return WeightSpec(bits=self.weight_bits, group=group_size, symmetric=symmetric)

    def activation_spec(
        self, weight: WeightSpec, *, static: bool = False, fitted: bool = True
    ) -> ActivationSpec | None:
        """The activation grid that goes with `weight`: 8 bits per token, fewer per token and weight group.

        `static` makes it one scale for all tokens and channels. Scales of at most `FITTED_BITS` bits are fitted, if
        `fitted` allows it.
        """
        if self.activation_bits is None:
            return None
        if static:
            return ActivationSpec(bits=self.activation_bits, static=True)
        group = weight.group if self.activation_bits < 8 else None
        fitted = fitted and self.activation_bits <= FITTED_BITS
        return ActivationSpec(bits=self.activation_bits, group=group, fitted=fitted)
