"""Quantized linears whose arguments are settled, called without PyTorch's dispatcher where nothing would notice."""

from typing import Any

import torch
from torch import Tensor

from optimum_qvlm.compat.torch import dispatch_mode_check, tracing_check, transform_check
from optimum_qvlm.kernels import dispatch
from optimum_qvlm.kernels.checks import require_activations, require_rounding, require_same_device
from optimum_qvlm.kernels.weights import LinearGrid, Rounding, StoredWeight

_in_dispatch_mode, _is_traced, _transform = dispatch_mode_check(), tracing_check(), transform_check()


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody traces, transforms or differentiates what is done to `x`, so that an operation may be left out."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or _in_dispatch_mode():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not _is_traced() and _transform() is None


class BoundLinear:
    """`torch.ops.optimum_qvlm.linear` of one weight: the same kernels and results, its arguments checked once.

    Copies and pickles of it are None, since a copy of a module has a weight of its own.
    """

    def __init__(
        self, stored: StoredWeight, bias: Tensor | None, rounding: Rounding, grid: LinearGrid, settings: str = ""
    ) -> None:
        """Settle all but the activation. `settings` are for the owner, see `is_of`.

        Raises:
            SpecError: tensors lie on several devices, or the rounding does not fit the channels.
        """
        require_rounding(stored.values.new_empty(0, grid.in_features), rounding)
        require_same_device(stored.values, scale=stored.scale, bias=bias, equalizer=rounding.equalizer)
        self.settings = settings
        self.values, self.scale, self.zero_point = stored.values, stored.scale, stored.zero_point
        self.bias, self.equalizer, self.input_scale = bias, rounding.equalizer, rounding.scale
        self.few_elements = grid.decode_tokens * grid.in_features
        self.in_features, self.device = grid.in_features, stored.values.device
        self.many = dispatch.bind(stored, bias, rounding, grid)
        few = rounding.unrounded()
        self.few = self.many if few is rounding else dispatch.bind(stored, bias, few, grid)

    def is_of(self, settings: str, held: dict[str, Any]) -> bool:
        """Whether these are the settings and the very tensors, by the names of the module's parameters."""
        return (
            self.values is held["weight_packed"]
            and self.scale is held["weight_scale"]
            and self.bias is held["bias"]
            and self.zero_point is held["weight_zero_point"]
            and self.equalizer is held["input_equalizer"]
            and self.input_scale is held["input_scale"]
            and self.settings == settings
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Product of the activations [..., in_features], plus bias, in their dtype.

        Raises:
            SpecError: they have other channels, or are on another device.
        """
        require_activations(x, self.in_features)
        if x.device != self.device:
            require_same_device(x, weight=self.values)
        return self.few(x) if x.numel() <= self.few_elements else self.many(x)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()
