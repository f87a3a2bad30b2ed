"""Launches of Triton kernels, written down once and repeated for other activations.

For every launch Triton finds the compiled kernel anew from the types, values and alignment of some twenty arguments,
which takes the processor longer than a small kernel takes the GPU. What is repeated here skips that.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.compat.triton import (
    argument_names,
    arithmetic_options,
    descriptor_class,
    is_compiled,
    launcher,
    stream_of,
)

ALIGNMENT = 16
"""Bytes: kernels are compiled for pointers that are multiples of it, or for any; bulk copies take only the former."""


_Descriptor = descriptor_class()


class _Open(threading.local):
    recording: "Recording | None" = None


_open = _Open()


@dataclass(frozen=True, slots=True)
class _Allocation:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, slots: list[Tensor], _stream: int) -> None:
        slots.append(torch.empty(self.shape, dtype=self.dtype, device=self.device))


@dataclass(frozen=True, slots=True)
class _Start:
    """A compiled kernel with its arguments in their order, of which those at `open` come from slots."""

    run: Callable[..., None]
    arguments: list[Any]
    open: list[tuple[int, int]]
    described: list[tuple[int, int, tuple[Any, ...]]]

    def __call__(self, slots: list[Tensor], stream: int) -> None:
        arguments = self.arguments.copy()
        for place, slot in self.open:
            # As an address: a launch would ask the driver where the memory of a tensor lies.
            arguments[place] = slots[slot].data_ptr()
        for place, slot, extent in self.described:
            arguments[place] = _Descriptor(slots[slot], *extent)
        self.run(stream, *arguments)


class Recording:
    """What a function launched for one activation, ready for others of its shape, strides, dtype and alignment.

    Slot 0 is the activation, the others are tensors that the function allocated by `empty`.
    """

    def __init__(self, x: Tensor, constants: Iterable[Tensor]) -> None:
        self._steps: list[_Allocation | _Start] = []
        self._device, self._result = x.device, 0
        self._stream_of = stream_of() if x.is_cuda else None
        self._slots, self._constants = [x], list(constants)
        self._whole = True

    def __call__(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Launch everything again with `x`; the result gets `shape`, which must have as many elements."""
        if self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                return self._again(x, shape)
        return self._again(x, shape)

    def _again(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        assert self._stream_of is not None and self._device.index is not None
        slots, stream = [x], self._stream_of(self._device.index)
        for step in self._steps:
            if len(slots) == self._result and type(step) is _Allocation:
                slots.append(torch.empty(shape, dtype=step.dtype, device=step.device))
            else:
                step(slots, stream)
        return slots[self._result]

    def allocated(self, tensor: Tensor) -> None:
        """A tensor that later steps may use."""
        self._steps.append(_Allocation(tuple(tensor.shape), tensor.dtype, tensor.device))
        self._slots.append(tensor)

    def started(self, compiled: Any, grid: tuple[int, ...], names: list[str], arguments: Mapping[str, Any]) -> None:
        """A launch. It cannot be repeated where a tensor is no slot and no constant, or nothing was compiled."""
        if not is_compiled(compiled):
            self._whole = False
            return
        values = [arguments[name] for name in names]
        start = _Start(launcher(compiled, grid), values, [], [])
        for place, value in enumerate(values):
            tensor = value.base if isinstance(value, _Descriptor) else value
            if not isinstance(tensor, Tensor) or any(tensor is constant for constant in self._constants):
                continue
            slot = next((n for n, kept in enumerate(self._slots) if kept is tensor), None)
            values[place] = None
            if slot is None:
                self._whole = False
            elif tensor is value:
                start.open.append((place, slot))
            else:
                start.described.append((place, slot, (value.shape, value.strides, value.block_shape, value.padding)))
        self._steps.append(start)

    def closed(self, result: Tensor) -> bool:
        """Let go of the tensors; whether everything that led to `result` can be repeated."""
        found = [n for n, kept in enumerate(self._slots) if kept is result]
        self._slots, self._constants = [], []
        self._result = found[0] if found else 0
        return self._whole and self._result > 0


def record(
    function: Callable[[Tensor], Tensor], x: Tensor, constants: Iterable[Tensor]
) -> tuple[Tensor, Recording | None]:
    """`function(x)` and its recording; None where something else than launches led to the result.

    Args:
        function: computes with nothing but `start` and `empty`, or is not recorded.
        x: on a CUDA device.
        constants: all other tensors that it reads.
    """
    outer, _open.recording = _open.recording, Recording(x, constants)
    try:
        result = function(x)
        recording = _open.recording
        return result, recording if recording.closed(result) else None
    finally:
        _open.recording = outer


def start(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], device: torch.device, **options: Any
) -> None:
    """Launch a kernel on `device` with arguments by their names; `options` are those of Triton, such as num_warps."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        compiled = kernel[grid](**arguments, **arithmetic_options(), **options)
    if _open.recording is not None:
        _open.recording.started(compiled, grid, argument_names(kernel), arguments)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor on the device of `like`, by default of its dtype."""
    tensor = like.new_empty(shape, dtype=dtype)
    if _open.recording is not None:
        _open.recording.allocated(tensor)
    return tensor
