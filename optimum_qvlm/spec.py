"""What a weight or an activation is quantized to. Values only; no tensors here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from optimum_qvlm.errors import SpecError

GroupSize = int | Literal["auto"] | None

AUTO_GROUPS = (128, 64, 32, 16)
"""Group sizes that `"auto"` tries, in this order."""

TWO_LEVEL_BITS = 4
"""The most bits of codes that may be multiplied by the multiples of `optimum_qvlm.kernels.levels` and fit a byte."""

FITTED_BITS = 5
"""The most bits of activations whose scales are fitted: where there are more codes, next to nothing is gained."""

UNROUNDED = 16
"""How a scheme writes activations that are not rounded. Everywhere else they have no grid, or None bits."""

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

    def special(self) -> frozenset[str]:
        """Names of the yes-no fields that are not what they are by default."""
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return frozenset(name for name, value, usual in values if isinstance(value, bool) and value != usual)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """How one linear is quantized: its grids, the clip of its activations, the transform of its site.

    `activation` None leaves activations in floating point. `activation_clip` is the ratio of each token's (or group's)
    peak that the largest code stands for; `equalized` and `rotation` say what
    `optimum_qvlm.quant.transform.SiteTransform` does to the activations.
    """

    weight: WeightSpec
    activation: ActivationSpec | None = None
    activation_clip: float = 1.0
    equalized: bool = False
    rotation: int | None = None


_SHARED_NAMES = {field.name for field in fields(WeightSpec)} & {field.name for field in fields(ActivationSpec)}

WEIGHT_NAMES = {
    f"weight_{field.name}" if field.name in _SHARED_NAMES else field.name: field.name for field in fields(WeightSpec)
}
"""What the fields of a weight's grid are called in one flat row with those of activations: in JSON, in operations."""

ACTIVATION_NAMES = {f"activation_{field.name}": field.name for field in fields(ActivationSpec)}
"""The same for those of an activation's grid."""


def flat_grids(weight: WeightSpec, activation: ActivationSpec | None) -> dict[str, Any]:
    """Both grids as one flat row of plain values. Without a grid, `activation_bits` is None and the rest as usual."""
    values = {flat: getattr(weight, name) for flat, name in WEIGHT_NAMES.items()}
    if activation is not None:
        return values | {flat: getattr(activation, name) for flat, name in ACTIVATION_NAMES.items()}
    usual = ActivationSpec(bits=8)
    rest = {flat: None if name == "bits" else getattr(usual, name) for flat, name in ACTIVATION_NAMES.items()}
    return values | rest


def read_flat_grids(values: Mapping[str, Any]) -> tuple[WeightSpec, ActivationSpec | None]:
    """Undo `flat_grids`; fields that are missing are as usual, and names that belong to neither are passed over.

    Raises:
        SpecError: a grid that cannot be.
    """
    weight = WeightSpec(**{name: values[flat] for flat, name in WEIGHT_NAMES.items() if flat in values})
    if values["activation_bits"] is None:
        return weight, None
    given = {name: values[flat] for flat, name in ACTIVATION_NAMES.items() if flat in values}
    return weight, ActivationSpec(**given)


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
        return cls(int(match[1]), None if activation == UNROUNDED else activation)

    @classmethod
    def of(cls, weight: WeightSpec, activation: ActivationSpec | None) -> "Scheme":
        """The bits of two grids."""
        return cls(weight.bits, None if activation is None else activation.bits)

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits or UNROUNDED}"

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
