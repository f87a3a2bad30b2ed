"""Gradients through a model that is on the device one layer at a time.

A forward keeps only what enters each layer, on the CPU. The backward pass moves each layer to the device once more,
runs it again, and takes its gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qvlm.compat.torch import flatten, unflatten
from optimum_qvlm.pipeline.layer_streaming import resident, streamed, units


@contextmanager
def recomputed(model: nn.Module, layers: Iterable[str], device: torch.device) -> Iterator[None]:
    """As `streamed`, and a backward pass may follow a forward while inside.

    Units (layers, and what holds none) get gradients for the tensors that they are given and for parameters of their
    own that require them. A unit must compute the same when it is run again: no dropout.
    """
    paths = set(layers)
    with ExitStack() as stack:
        for unit in units(model, paths):
            stack.callback(_restore, unit, unit.__dict__.get("forward"))
            unit.forward = _Recomputing(unit, device)
        stack.enter_context(streamed(model, paths, device))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` takes gradients inside, and each does afterwards what it did before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _restore(unit: nn.Module, forward: Any) -> None:
    """The forward that the unit had: its own attribute, or that of its class."""
    if forward is None:
        del unit.__dict__["forward"]
    else:
        unit.__dict__["forward"] = forward


class _Recomputing:
    """Stands in for the forward of one unit."""

    def __init__(self, unit: nn.Module, device: torch.device) -> None:
        self.unit, self.device, self.inner = unit, device, unit.forward
        # Outputs of a unit that learns need gradients also where no input does.
        self.anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        learns = any(parameter.requires_grad for parameter in self.unit.parameters())
        if not torch.is_grad_enabled() or not (places or learns):
            return self.inner(*args, **kwargs)
        tensors = [leaves[place] for place in places]
        for place in places:
            leaves[place] = None  # else they would stay on the device until the backward pass
        call = _Call(self.inner, leaves, form, places)
        outputs: Any = _Recomputed.apply(call, self.unit, self.device, self.anchor, *tensors)  # type: ignore[no-untyped-call]
        return unflatten(list(outputs), call.output_form)


class _Call:
    """One call of a unit, without the tensors that gradients flow to."""

    def __init__(self, inner: Callable[..., Any], leaves: list[Any], form: Any, places: list[int]) -> None:
        self.inner, self.leaves, self.form, self.places = inner, leaves, form, places
        self.output_form: Any = None

    def run(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Leaves of the output for other tensors in the same places."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = unflatten(leaves, self.form)
        outputs, self.output_form = flatten(self.inner(*args, **kwargs))
        return tuple(outputs)


class _Recomputed(torch.autograd.Function):
    """A call whose inputs wait on the CPU, and which is run again for its gradients."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, unit: nn.Module, device: torch.device, _anchor: Tensor, *tensors: Tensor
    ) -> tuple[Any, ...]:
        ctx.call, ctx.unit, ctx.device = call, unit, device
        ctx.inputs = [tensor.detach().cpu() for tensor in tensors]
        return call.run(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        inputs = [tensor.to(ctx.device).detach().requires_grad_() for tensor in ctx.inputs]
        with resident(ctx.unit, "", ctx.device), torch.enable_grad():
            outputs = ctx.call.run(inputs)
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and isinstance(output, Tensor) and output.requires_grad
            ]
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, None, None, *(tensor.grad for tensor in inputs))
