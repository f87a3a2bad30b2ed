"""The product's operation as PyTorch sees it: its schema, made from the fields of the grids, and its arguments.

Tensors come first, then the layout's name, sizes, the fields of both grids and what else is a plain value. A new field
of a grid becomes an argument by itself. What tensors say is no argument: where there is no zero point the weight's grid
is symmetric, and where there is an input scale the activation's is static.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

from optimum_qvlm.kernels.weights import LinearGrid, Rounding, StoredWeight
from optimum_qvlm.spec import (
    ACTIVATION_NAMES,
    WEIGHT_NAMES,
    ActivationSpec,
    LinearFormat,
    WeightSpec,
    flat_grids,
    read_flat_grids,
)

WEIGHT_TENSORS = "Tensor weight, Tensor scale, Tensor? zero_point"

_SAID_BY_TENSORS = ("symmetric", "activation_static")

_HINTS = get_type_hints(WeightSpec), get_type_hints(ActivationSpec)

VALUES: dict[str, Any] = {
    "layout": str,
    "in_features": int,
    "out_features": int,
    **{flat: _HINTS[0][name] for flat, name in WEIGHT_NAMES.items() if flat not in _SAID_BY_TENSORS},
    **{flat: _HINTS[1][name] for flat, name in ACTIVATION_NAMES.items() if flat not in _SAID_BY_TENSORS},
    "activation_bits": int | None,
    "clip": float,
    "rotation": int | None,
    "decode_tokens": int,
}
"""Type of each plain argument by name, in the order of the schema."""

_KINDS = {str: "str", int: "int", bool: "bool", float: "float", int | None: "int?"}

FORMAT = ", ".join(
    ["Tensor? equalizer", "Tensor? input_scale", *(f"{_KINDS[kind]} {name}" for name, kind in VALUES.items())]
)
"""All that the schema has behind `bias`."""


def _yes(text: str) -> bool:
    return text == "True"


def _number_or_none(text: str) -> int | None:
    return None if text == "None" else int(text)


_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    bool: _yes,
    float: float,
    int | None: _number_or_none,
}
_VALUE_READERS = tuple(_READERS[kind] for kind in VALUES.values())


def written(layout: str, in_features: int, out_features: int, decode_tokens: int, format: LinearFormat) -> str:
    """Whether there are a zero point, an equalizer and a fixed scale, and all plain arguments, as one line."""
    values = flat_grids(format.weight, format.activation) | {
        "layout": layout,
        "in_features": in_features,
        "out_features": out_features,
        "clip": format.activation_clip,
        "rotation": format.rotation,
        "decode_tokens": decode_tokens,
    }
    flags = (not format.weight.symmetric, format.equalized, values["activation_static"])
    return " ".join(map(str, (*flags, *(values[name] for name in VALUES))))


def parsed(settings: str) -> tuple[bool, bool, bool, list[Any]]:
    """Undo `written`: the three flags, and the arguments in the order of the schema. Compiled code runs through it."""
    zero, equalized, static, *texts = settings.split()
    values = [read(text) for read, text in zip(_VALUE_READERS, texts, strict=True)]
    return _yes(zero), _yes(equalized), _yes(static), values


remembered = lru_cache(maxsize=4096)(parsed)
"""`parsed` for calls that nobody compiles, of which each linear has many with the same settings."""


def read(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, equalizer: Tensor | None, input_scale: Tensor | None,
    layout: str, *values: Any,
) -> tuple[StoredWeight, Rounding, LinearGrid]:  # fmt: skip
    """The arguments of the operation without activation and bias, as values."""
    grid, clip, rotation = _grid(zero_point is None, input_scale is not None, scale.dtype, *values)
    rounding = Rounding.of(grid.activation, clip=clip, scale=input_scale, equalizer=equalizer, rotation=rotation)
    return StoredWeight(layout, weight, scale, zero_point), rounding, grid


@lru_cache(maxsize=4096)
def _grid(
    symmetric: bool, static: bool, scale_dtype: torch.dtype, *values: Any
) -> tuple[LinearGrid, float, int | None]:
    """Grid, clip and rotation. Made once for each format in use, since every call of every linear reads it."""
    named = dict(zip(list(VALUES)[1:], values, strict=True)) | {"symmetric": symmetric, "activation_static": static}
    weight, activation = read_flat_grids(named)
    grid = LinearGrid(
        in_features=named["in_features"],
        out_features=named["out_features"],
        weight=weight,
        activation=activation,
        scale_dtype=scale_dtype,
        decode_tokens=named["decode_tokens"],
    )
    return grid, named["clip"], named["rotation"]
