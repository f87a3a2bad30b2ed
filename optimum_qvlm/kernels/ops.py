"""The operations as PyTorch sees them: schemas, shapes without data, gradients.

`torch.ops.optimum_qvlm.quantize` and `.linear`, so that `torch.compile`, CUDA graphs and export take each as one node.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.compat.torch import below_autograd_guard
from optimum_qvlm.kernels import dispatch
from optimum_qvlm.kernels.bound import is_plain
from optimum_qvlm.kernels.checks import FULL_BITS, require_activations, require_rounding, require_same_device
from optimum_qvlm.kernels.weights import NOTHING, Rounding, StoredWeight, WeightGrid

LIBRARY = torch.library.Library("optimum_qvlm", "DEF")

_below_autograd = below_autograd_guard()

_WEIGHT = "Tensor weight, Tensor scale, Tensor? zero_point"
_FORMAT = (
    "Tensor? equalizer, Tensor? input_scale, str layout, int in_features, int out_features, int weight_bits, "
    "int? weight_group, bool two_level, int activation_bits, int? activation_group, float clip, int? rotation, "
    "int decode_tokens"
)

LIBRARY.define(
    "quantize(Tensor x, int bits, int? group, float clip, Tensor? scale, Tensor? equalizer, int? rotation) "
    "-> (Tensor codes, Tensor scale)"
)
LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, {_FORMAT}) -> Tensor")
LIBRARY.define(f"linear_backward(Tensor gradient, {_WEIGHT}, {_FORMAT}) -> Tensor")


def quantize(
    x: Tensor,
    bits: int,
    group: int | None = None,
    clip: float = 1.0,
    scale: Tensor | None = None,
    equalizer: Tensor | None = None,
    rotation: int | None = None,
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

    Returns:
        int8 codes of the shape of `x`, and fp32 scales [..., groups] ([1] where `scale` is given).

    Raises:
        SpecError: sizes that do not divide the channels.
    """
    codes, found = torch.ops.optimum_qvlm.quantize(x, bits, group, clip, scale, equalizer, rotation)
    return codes, found


def _quantize(
    x: Tensor,
    bits: int,
    group: int | None,
    clip: float,
    scale: Tensor | None,
    equalizer: Tensor | None,
    rotation: int | None,
) -> tuple[Tensor, Tensor]:
    require_activations(x)
    require_rounding(x, bits, group, clip, rotation)
    require_same_device(x, scale=scale, equalizer=equalizer)
    rounding = Rounding(bits=bits, group=group, clip=clip, scale=scale, equalizer=equalizer, rotation=rotation)
    return dispatch.quantize(x, rounding)


def _quantize_fake(
    x: Tensor,
    bits: int,
    group: int | None,
    clip: float,
    scale: Tensor | None,
    equalizer: Tensor | None,
    rotation: int | None,
) -> tuple[Tensor, Tensor]:
    require_activations(x)
    require_rounding(x, bits, group, clip, rotation)
    groups = 1 if group is None else x.shape[-1] // group
    found = x.new_empty((1,) if scale is not None else (*x.shape[:-1], groups), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), found


def _linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    stored, rounding, grid = _read(weight, scale, zero_point, *rest)
    require_activations(x, grid.in_features)
    if x.numel() <= grid.decode_tokens * grid.in_features:
        rounding = rounding.unrounded()
    if rounding is not NOTHING:
        require_rounding(x, rounding.bits, rounding.group, rounding.clip, rounding.rotation)
    require_same_device(x, weight=weight, scale=scale, bias=bias, equalizer=rounding.equalizer)
    return dispatch.linear(x, stored, bias, rounding, grid)


def _linear_fake(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, *rest: Any
) -> Tensor:
    grid = _read(weight, scale, zero_point, *rest)[2]
    require_activations(x, grid.in_features)
    return x.new_empty((*x.shape[:-1], grid.out_features))


def _backward(gradient: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Tensor:
    stored, rounding, grid = _read(weight, scale, zero_point, *rest)
    return dispatch.linear_backward(gradient, stored, rounding, grid)


def _backward_fake(gradient: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Tensor:
    grid = _read(weight, scale, zero_point, *rest)[2]
    return gradient.new_empty((*gradient.shape[:-1], grid.in_features))


def _read(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any
) -> tuple[StoredWeight, Rounding, WeightGrid]:
    """The arguments after the schema's `bias` as values."""
    equalizer, input_scale, layout, in_features, out_features, bits, group, levels, *activation, few = rest
    a_bits, a_group, clip, rotation = activation
    zero = zero_point is not None
    grid = _grid(in_features, out_features, bits, group, levels, zero, scale.dtype, a_bits, a_group, few)
    if a_bits == FULL_BITS and equalizer is None and rotation is None:
        return StoredWeight(layout, weight, scale, zero_point), NOTHING, grid
    rounding = Rounding(
        bits=a_bits, group=a_group, clip=clip, scale=input_scale, equalizer=equalizer, rotation=rotation
    )
    return StoredWeight(layout, weight, scale, zero_point), rounding, grid


@lru_cache(maxsize=1024)
def _grid(
    in_features: int,
    out_features: int,
    bits: int,
    group: int | None,
    two_level: bool,
    zero_point: bool,
    scale_dtype: torch.dtype,
    activation_bits: int,
    activation_group: int | None,
    decode_tokens: int,
) -> WeightGrid:
    """A value for each format in use; made once, since every call of every linear reads it."""
    return WeightGrid(
        in_features=in_features,
        out_features=out_features,
        bits=bits,
        group=group,
        zero_point=zero_point,
        scale_dtype=scale_dtype,
        activation_bits=activation_bits,
        activation_group=activation_group,
        decode_tokens=decode_tokens,
        two_level=two_level,
    )


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
