"""Which code runs: a layout is chosen once per weight and device, and names the module that computes with it."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import reference
from optimum_qvlm.kernels.backend import Backend, Quantizer, Recursion
from optimum_qvlm.kernels.packing import pack_codes, unpack_codes
from optimum_qvlm.kernels.weights import (
    CHECKPOINT_LAYOUTS,
    PACKED,
    TRANSIENT,
    LinearGrid,
    QuantizedWeight,
    Rounding,
    StoredWeight,
)

_PACKAGE = "optimum_qvlm.kernels."

BACKENDS = {"cpu": ("cpu.rows", "cpu.int4", "cpu.table"), "cuda": ("triton.linear",)}
"""Backends for a device type, best first. The definition runs where none accepts a weight."""

QUANTIZERS = {"cuda": "triton.quantize"}
"""Quantizers for a device type."""

RECURSIONS = {"cuda": "triton.recursion"}
"""Recursions for a device type."""

if TYPE_CHECKING:  # at run time each is imported when it is first needed: some need packages that are not everywhere
    from optimum_qvlm.kernels.cpu import int4, rows, table
    from optimum_qvlm.kernels.triton import linear as triton_linear
    from optimum_qvlm.kernels.triton import quantize as triton_quantize
    from optimum_qvlm.kernels.triton import recursion as triton_recursion

    _ROWS: Backend = rows
    _INT4: Backend = int4
    _TABLE: Backend = table
    _TRITON: Backend = triton_linear
    _QUANTIZER: Quantizer = triton_quantize
    _RECURSION: Recursion = triton_recursion


def choose_layout(grid: LinearGrid, device: torch.device) -> str:
    """The layout in which a weight is fastest on `device`: `"packed"` where only the definition runs."""
    special = grid.weight.special()
    for backend in _backends(device.type):
        if special <= backend.KNOWN and backend.accepts(grid, device):
            return backend.LAYOUT
    return PACKED


def store(weight: QuantizedWeight, grid: LinearGrid, layout: str) -> StoredWeight:
    """Codes in the tensors of `layout`."""
    if layout not in CHECKPOINT_LAYOUTS:
        return _backend(layout).store(weight, grid)
    zero = None if weight.zero_point is None else pack_codes(weight.zero_point.T, grid.weight.bits).T.contiguous()
    return StoredWeight(layout, pack_codes(weight.codes, grid.weight.bits), weight.scale, zero)


def restore(stored: StoredWeight, grid: LinearGrid) -> QuantizedWeight:
    """Undo `store`, bit for bit."""
    if stored.layout not in CHECKPOINT_LAYOUTS:
        return _backend(stored.layout).restore(stored, grid)
    codes = unpack_codes(stored.values, grid.weight.bits, grid.in_features)
    zero = None
    if stored.zero_point is not None:
        zero = unpack_codes(stored.zero_point.T, grid.weight.bits, grid.out_features).T
    return QuantizedWeight(codes, stored.scale, zero)


def quantize(x: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes and scales by the fastest module for the device of `x`."""
    quantizer = cast(Quantizer | None, _module(QUANTIZERS.get(x.device.type)))
    if quantizer is not None:
        return quantizer.quantize(x, rounding)
    return reference.quantize(x, rounding)


def recursion(device: torch.device) -> Recursion | None:
    """The module that does `recursion` on `device`, None where only the definitions do."""
    return cast(Recursion | None, _module(RECURSIONS.get(device.type)))


def linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Tensor:
    """The product by the module of the weight's layout."""
    if stored.layout == TRANSIENT:
        layout = choose_layout(grid, x.device)
        stored = store(restore(stored, grid), grid, layout)
    if stored.layout != PACKED:
        return _backend(stored.layout).linear(x, stored, bias, rounding, grid)
    return reference.linear(x, restore(stored, grid), bias, rounding)


def bind(stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid) -> Callable[[Tensor], Tensor]:
    """`linear` with all but the activation, which must fit: nothing is checked. The tensors stay in use."""
    if stored.layout in CHECKPOINT_LAYOUTS:
        return lambda x: linear(x, stored, bias, rounding, grid)
    return _backend(stored.layout).bind(stored, bias, rounding, grid)


def linear_backward(gradient: Tensor, stored: StoredWeight, rounding: Rounding, grid: LinearGrid) -> Tensor:
    """Gradient to the input."""
    return reference.linear_backward(gradient, restore(stored, grid), rounding)


@cache
def _backend(layout: str) -> Backend:
    for device_type in BACKENDS:
        for backend in _backends(device_type):
            if layout == backend.LAYOUT:
                return backend
    raise SpecError(f"no kernel in this installation reads the layout {layout!r}; load the checkpoint again")


@cache
def _backends(device_type: str) -> list[Backend]:
    modules = [_module(name) for name in BACKENDS.get(device_type, ())]
    return [cast(Backend, module) for module in modules if module is not None]


@cache
def _module(name: str | None) -> Any:
    """A module of this package, imported when it is first needed; None where it is not part of this installation."""
    if name is None or find_spec(_PACKAGE + name) is None:
        return None
    return import_module(_PACKAGE + name)
