"""Run a model that lies on the CPU on another device, one layer at a time."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def resident(model: nn.Module, path: str, device: torch.device) -> Iterator[None]:
    """The submodule at `path` on `device` inside the block, and what is there afterwards back on the CPU.

    Tied parameters stay tied.
    """
    if device.type == "cpu":
        yield
        return
    model.get_submodule(path).to(device)
    try:
        yield
    finally:
        model.get_submodule(path).to("cpu")


@contextmanager
def streamed(model: nn.Module, layers: Iterable[str], device: torch.device) -> Iterator[None]:
    """While inside, forwards of `model` run on `device`: each of `layers` is there only while it runs.

    What holds no layer (embeddings, norms) moves as one unit in the same way; parameters that sit directly in
    a module with layers below stay on the device for the whole time.
    """
    if device.type == "cpu":
        yield
        return
    with ExitStack() as stack:
        for module in units(model, set(layers)):
            before = module.register_forward_pre_hook(lambda m, _args: _move(m, device))
            after = module.register_forward_hook(lambda m, _args, _out: _move(m, torch.device("cpu")), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        for holder in holders(model, set(layers)):
            stack.callback(_move_own, holder, torch.device("cpu"))
            _move_own(holder, device)
        yield


def units(model: nn.Module, layers: set[str], prefix: str = "") -> Iterator[nn.Module]:
    """The modules that move as one: outermost modules of `model` that are one of `layers` or hold none of them."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if path in layers or not any(layer.startswith(f"{path}.") for layer in layers):
            yield child
        else:
            yield from units(child, layers, f"{path}.")


def holders(model: nn.Module, layers: set[str]) -> Iterator[nn.Module]:
    """Modules with a layer below them."""
    for name, module in model.named_modules():
        if any(layer.startswith(f"{name}." if name else "") and layer != name for layer in layers):
            yield module


def _move(module: nn.Module, device: torch.device) -> None:
    module.to(device)


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move the parameters and buffers that `module` holds itself, not those of its children."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))
