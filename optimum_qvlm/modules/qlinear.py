"""A linear layer whose weight is stored as packed integers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from optimum_qvlm.kernels import fake_quantize_tokens, quantized_linear
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight
from optimum_qvlm.quant.packing import pack_codes, packed_width, unpack_codes
from optimum_qvlm.quant.spec import ActivationSpec, WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """How one linear is quantized: its grids and the clip of its activations.

    `activation_clip` is the ratio of each token's (or group's) peak that the largest code stands for.
    """

    weight: WeightSpec
    activation: ActivationSpec | None = None
    activation_clip: float = 1.0


class QuantLinear(nn.Linear):
    """`nn.Linear` over packed integers: `y = Q(x) dequantize(W)^T + b`.

    Parameters, of which only the bias can be trained:
        weight_packed: int32 [out_features, words], see `optimum_qvlm.quant.packing`.
        weight_scale: [out_features, groups], floating.
        weight_zero_point: int32 [words, groups], packed along the rows; None on a symmetric grid.
        bias: [out_features] or None.

    `format` holds the grids. `weight` is a property that dequantizes on demand, for code that looks at it.
    """

    weight_zero_point: Tensor | None
    _is_hf_initialized = True  # transformers would dequantize each weight at load, to fill a copy with random values

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: LinearFormat,
        *,
        bias: bool = True,
        scale_dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        bits, groups = format.weight.bits, format.weight.groups(in_features)
        words = packed_width(in_features, bits)
        self.weight_packed = _frozen(torch.empty(out_features, words, dtype=torch.int32, device=device))
        self.weight_scale = _frozen(torch.empty(out_features, groups, dtype=scale_dtype, device=device))
        zero = torch.empty(packed_width(out_features, bits), groups, dtype=torch.int32, device=device)
        self.register_parameter("weight_zero_point", None if format.weight.symmetric else _frozen(zero))
        shift = torch.empty(out_features, dtype=bias_dtype, device=device)
        self.register_parameter("bias", nn.Parameter(shift) if bias else None)

    @classmethod
    def from_quantized(cls, quantized: QuantizedWeight, bias: Tensor | None, format: LinearFormat) -> Self:
        """Pack a rounded weight; the bias is taken as it is."""
        rows, columns = quantized.codes.shape
        module = cls(
            columns,
            rows,
            format,
            bias=bias is not None,
            scale_dtype=quantized.scale.dtype,
            device=torch.device("meta"),
        )
        bits = format.weight.bits
        module.weight_packed = _frozen(pack_codes(quantized.codes, bits))
        module.weight_scale = _frozen(quantized.scale.detach().clone())
        if quantized.zero_point is not None:
            module.weight_zero_point = _frozen(pack_codes(quantized.zero_point.T, bits).T.contiguous())
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return module

    def quantized(self) -> QuantizedWeight:
        """The codes, scales and zero points, unpacked."""
        bits = self.format.weight.bits
        codes = unpack_codes(self.weight_packed, bits, self.in_features)
        zero = None
        if self.weight_zero_point is not None:
            zero = unpack_codes(self.weight_zero_point.T, bits, self.out_features).T
        return QuantizedWeight(codes, self.weight_scale, zero)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight [out_features, in_features] in the dtype of the scales."""
        return dequantize_weight(self.quantized()).to(self.weight_scale.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Product of the rounded input [..., in_features] with the weight, plus bias, in the input's dtype."""
        activation = self.format.activation
        if activation is not None:
            input = fake_quantize_tokens(input, activation.bits, activation.group, self.format.activation_clip)
        return quantized_linear(input, dequantize_weight(self.quantized()), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module, except that scales keep their dtype: codes were chosen for it."""
        scale = self.weight_scale.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = _frozen(scale.to(self.weight_scale.device))
        return self

    def reset_parameters(self) -> None:
        """Nothing to initialise: packed weights only come from a rounding or a checkpoint."""

    def extra_repr(self) -> str:
        """Features and grids, for `print(model)`."""
        weight, activation = self.format.weight, self.format.activation
        shown = f"weight={weight.bits} bits/{weight.group or 'row'}"
        if activation is not None:
            shown += f", activation={activation.bits} bits/{activation.group or 'token'}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {shown}, bias={self.bias is not None}"
        )

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain linear with the dequantized weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(dequantize_weight(self.quantized()).to(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
