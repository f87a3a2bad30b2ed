"""Which code runs: a layout is chosen once per weight and device, and names the module that computes with it."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import reference
from optimum_qvlm.kernels.packing import pack_codes, unpack_codes
from optimum_qvlm.kernels.weights import (
    CHECKPOINT_LAYOUTS,
    PACKED,
    TRANSIENT,
    CodedWeight,
    Rounding,
    StoredWeight,
    WeightGrid,
)

_PACKAGE = "optimum_qvlm.kernels."

BACKENDS = {"cpu": ("cpu.rows", "cpu.int4", "cpu.table"), "cuda": ("triton.linear",)}
"""Modules that may hold weights on a device type, best first. The definition runs where none accepts a weight.

Each has `LAYOUT`, its name, and
    accepts(grid, device) -> bool
    store(weight: CodedWeight, grid) -> StoredWeight        loses nothing
    restore(stored: StoredWeight, grid) -> CodedWeight      undoes `store`
    linear(x, stored: StoredWeight, bias, rounding, grid) -> Tensor
and may have
    bind(stored: StoredWeight, bias, rounding, grid) -> Callable[[Tensor], Tensor]        faster from the second call on
"""

QUANTIZERS = {"cuda": "triton.quantize"}
"""Modules with `quantize(x, rounding) -> (codes, scale)` for a device type."""

RECURSIONS = {"cuda": "triton.recursion"}
"""Modules with the functions of `recursion` for a device type."""


def choose_layout(grid: WeightGrid, device: torch.device) -> str:
    """The layout in which a weight is fastest on `device`: `"packed"` where only the definition runs."""
    for name in BACKENDS.get(device.type, ()):
        backend = _module(name)
        if backend is not None and backend.accepts(grid, device):
            return str(backend.LAYOUT)
    return PACKED


def store(weight: CodedWeight, grid: WeightGrid, layout: str) -> StoredWeight:
    """Codes in the tensors of `layout`."""
    if layout not in CHECKPOINT_LAYOUTS:
        stored: StoredWeight = _backend(layout).store(weight, grid)
        return stored
    zero = None if weight.zero_point is None else pack_codes(weight.zero_point.T, grid.bits).T.contiguous()
    return StoredWeight(layout, pack_codes(weight.codes, grid.bits), weight.scale, zero)


def restore(stored: StoredWeight, grid: WeightGrid) -> CodedWeight:
    """Undo `store`, bit for bit."""
    if stored.layout not in CHECKPOINT_LAYOUTS:
        weight: CodedWeight = _backend(stored.layout).restore(stored, grid)
        return weight
    codes = unpack_codes(stored.values, grid.bits, grid.in_features)
    zero = None
    if stored.zero_point is not None:
        zero = unpack_codes(stored.zero_point.T, grid.bits, grid.out_features).T
    return CodedWeight(codes, stored.scale, zero)


def quantize(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes and scales by the fastest module for the device of `x`."""
    name = QUANTIZERS.get(x.device.type)
    backend = None if name is None else _module(name)
    if backend is not None:
        codes, scale = backend.quantize(x, rounding)
        return codes, scale
    transformed = reference.transform_tokens(x, rounding.equalizer, rounding.rotation)
    if rounding.scale is not None:
        return reference.quantize_static(transformed, rounding.bits, rounding.scale), rounding.scale.float().clone()
    return reference.quantize_tokens(transformed, rounding.bits, rounding.group, rounding.clip)


def recursion(device: torch.device) -> Any:
    """The module that does `recursion` on `device`, None where only the definitions do."""
    name = RECURSIONS.get(device.type)
    return None if name is None else _module(name)


def linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: WeightGrid) -> Tensor:
    """The product by the module of the weight's layout."""
    if stored.layout == TRANSIENT:
        layout = choose_layout(grid, x.device)
        stored = store(restore(stored, grid), grid, layout)
    if stored.layout != PACKED:
        y: Tensor = _backend(stored.layout).linear(x, stored, bias, rounding, grid)
        return y
    return reference.linear(x, restore(stored, grid), bias, rounding)


def bind(stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: WeightGrid) -> Callable[[Tensor], Tensor]:
    """`linear` with all but the activation, which must fit: nothing is checked. The tensors stay in use."""
    if stored.layout in CHECKPOINT_LAYOUTS:
        return lambda x: linear(x, stored, bias, rounding, grid)
    backend = _backend(stored.layout)
    if hasattr(backend, "bind"):
        bound: Callable[[Tensor], Tensor] = backend.bind(stored, bias, rounding, grid)
        return bound
    return lambda x: backend.linear(x, stored, bias, rounding, grid)


def linear_backward(gradient: Tensor, stored: StoredWeight, rounding: Rounding, grid: WeightGrid) -> Tensor:
    """Gradient to the input."""
    return reference.linear_backward(gradient, restore(stored, grid), rounding)


@cache
def _backend(layout: str) -> Any:
    for names in BACKENDS.values():
        for name in names:
            backend = _module(name)
            if backend is not None and layout == backend.LAYOUT:
                return backend
    raise SpecError(f"no kernel in this installation reads the layout {layout!r}; load the checkpoint again")


@cache
def _module(name: str) -> Any:
    """A backend, imported when it is first wanted; None where it is not part of this installation."""
    if find_spec(_PACKAGE + name) is None:
        return None
    return import_module(_PACKAGE + name)
