"""The operations as PyTorch sees them: schemas, shapes without data, gradients.

`torch.ops.optimum_qvlm.quantize` and `.linear`, so that `torch.compile`, CUDA graphs and export take each as one node.
"""

from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.compat.torch import below_autograd_guard
from optimum_qvlm.kernels import dispatch, schema
from optimum_qvlm.kernels.bound import is_plain
from optimum_qvlm.kernels.checks import require_activations, require_rounding, require_same_device
from optimum_qvlm.kernels.weights import NOTHING, Rounding

LIBRARY = torch.library.Library("optimum_qvlm", "DEF")

_below_autograd = below_autograd_guard()

LIBRARY.define(
    "quantize(Tensor x, int bits, int? group, float clip, Tensor? scale, Tensor? equalizer, int? rotation, "
    "bool fitted) -> (Tensor codes, Tensor scale)"
)
LIBRARY.define(f"linear(Tensor x, {schema.WEIGHT_TENSORS}, Tensor? bias, {schema.FORMAT}) -> Tensor")
LIBRARY.define(f"linear_backward(Tensor gradient, {schema.WEIGHT_TENSORS}, {schema.FORMAT}) -> Tensor")


def quantize(
    x: Tensor,
    bits: int,
    group: int | None = None,
    clip: float = 1.0,
    scale: Tensor | None = None,
    equalizer: Tensor | None = None,
    rotation: int | None = None,
    fitted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform activations and round them, see `quantize_tokens`, `quantize_static` and `transform_tokens`.

    Args:
        x: activations [..., channels], any floating dtype.
        bits: 2..8.
        group: channels that share a scale; None shares the token.
        clip: ratio of the peak that maps to the largest code.
        scale: fp32 [1], a fixed scale in place of dynamic ones.
        equalizer: fp32 [channels], multiplies the activations before they are rounded.
        rotation: size of the Hadamard blocks that multiply them after that.
        fitted: fit sign and size of each dynamic scale.

    Returns:
        int8 codes of the shape of `x`, and fp32 scales [..., groups] ([1] where `scale` is given).

    Raises:
        SpecError: sizes that do not divide the channels.
    """
    codes, found = torch.ops.optimum_qvlm.quantize(x, bits, group, clip, scale, equalizer, rotation, fitted)
    return codes, found


def _quantize(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rounding = _read_rounding(x, *rest)
    require_same_device(x, scale=rounding.scale, equalizer=rounding.equalizer)
    return dispatch.quantize(x, rounding)


def _quantize_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rounding = _read_rounding(x, *rest)
    groups = 1 if rounding.group is None else x.shape[-1] // rounding.group
    found = x.new_empty((1,) if rounding.scale is not None else (*x.shape[:-1], groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), found


def _read_rounding(
    x: Tensor,
    bits: int,
    group: int | None,
    clip: float,
    scale: Tensor | None,
    equalizer: Tensor | None,
    rotation: int | None,
    fitted: bool,
) -> Rounding:
    """The arguments of `quantize` as a value that fits `x`."""
    require_activations(x)
    rounding = Rounding(
        bits=bits, group=group, clip=clip, scale=scale, equalizer=equalizer, rotation=rotation, fitted=fitted
    )
    require_rounding(x, rounding)
    return rounding


def _linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    stored, rounding, grid = schema.read(weight, scale, zero_point, *rest)
    require_activations(x, grid.in_features)
    if x.numel() <= grid.decode_tokens * grid.in_features:
        rounding = rounding.unrounded()
    if rounding is not NOTHING:
        require_rounding(x, rounding)
    require_same_device(x, weight=weight, scale=scale, bias=bias, equalizer=rounding.equalizer)
    return dispatch.linear(x, stored, bias, rounding, grid)


def _linear_fake(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    grid = schema.read(weight, scale, zero_point, *rest)[2]
    require_activations(x, grid.in_features)
    return x.new_empty((*x.shape[:-1], grid.out_features))


def _backward(gradient: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Tensor:
    stored, rounding, grid = schema.read(weight, scale, zero_point, *rest)
    return dispatch.linear_backward(gradient, stored, rounding, grid)


def _backward_fake(gradient: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Tensor:
    grid = schema.read(weight, scale, zero_point, *rest)[2]
    return gradient.new_empty((*gradient.shape[:-1], grid.in_features))


class _Linear(torch.autograd.Function):
    """The product, straight through the rounding: the gradient depends on the weight alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        _x, weight, scale, zero_point, bias, equalizer, input_scale, *rest = inputs
        ctx.save_for_backward(weight, scale, zero_point, equalizer, input_scale)
        ctx.rest, ctx.bias_dtype = rest, None if bias is None else bias.dtype
        with _below_autograd():
            return torch.ops.optimum_qvlm.linear.default(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight, scale, zero_point, equalizer, input_scale = ctx.saved_tensors
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            to_input = torch.ops.optimum_qvlm.linear_backward(
                gradient, weight, scale, zero_point, equalizer, input_scale, *ctx.rest
            )
        if ctx.needs_input_grad[4]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return (to_input, None, None, None, to_bias, *[None] * (2 + len(ctx.rest)))


def _linear_tracking(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Any, *rest: Any) -> Any:
    """Where autograd looks. Tensors that nobody watches skip a second way through the dispatcher."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, scale, zero_point, bias, *rest)  # type: ignore[no-untyped-call]
    if is_plain(x, bias):
        return _linear(x, weight, scale, zero_point, bias, *rest)
    with _below_autograd():
        return torch.ops.optimum_qvlm.linear.default(x, weight, scale, zero_point, bias, *rest)


def _register() -> None:
    backend = "CompositeExplicitAutograd"  # any device: what runs is chosen by layout and device inside
    LIBRARY.impl("quantize", _quantize, backend)
    LIBRARY.impl("linear", _linear, backend)
    LIBRARY.impl("linear_backward", _backward, backend)
    torch.library.register_fake("optimum_qvlm::quantize", _quantize_fake, lib=LIBRARY)
    torch.library.register_fake("optimum_qvlm::linear", _linear_fake, lib=LIBRARY)
    torch.library.register_fake("optimum_qvlm::linear_backward", _backward_fake, lib=LIBRARY)
    LIBRARY.impl("linear", _linear_tracking, "Autograd")


_register()
