"""A linear that tries rounding functions: what `QuantLinear` computes, over a dense weight that can be exchanged."""

from typing import Self

from torch import Tensor, nn

from optimum_qvlm.kernels import fake_quantize_static, fake_quantize_tokens, quantized_linear
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight
from optimum_qvlm.quant.spec import ActivationSpec
from optimum_qvlm.quant.transform import SiteTransform


class TrialLinear(nn.Linear):
    """`y = Q(x T) dequantize(W)^T + b` with the weight kept dequantized, in its own dtype and on its own device.

    Gives exactly what the `QuantLinear` of the same rounding function gives. The bias is shared with the linear that
    it stands in for.
    """

    activation: ActivationSpec | None
    activation_clip: float
    input_scale: Tensor | None
    transform: SiteTransform

    @classmethod
    def of(cls, linear: nn.Linear, activation: ActivationSpec | None) -> Self:
        """A stand-in for `linear`, which takes its first rounding function from `set_rounding`."""
        trial = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        trial.bias = linear.bias
        trial.activation, trial.activation_clip = activation, 1.0
        trial.input_scale, trial.transform = None, SiteTransform()
        return trial

    def set_rounding(
        self, weight: QuantizedWeight, activation_clip: float, transform: SiteTransform, input_scale: Tensor | None
    ) -> None:
        """Round as told from now on. `weight` has the inverse of `transform` folded in."""
        dense = dequantize_weight(weight).to(self.weight.dtype)
        self.weight = nn.Parameter(dense, requires_grad=False)
        self.activation_clip, self.transform, self.input_scale = activation_clip, transform, input_scale

    def forward(self, input: Tensor) -> Tensor:
        """Product of the rounded input [..., in_features] with the weight, plus bias, in the input's dtype."""
        dtype = input.dtype
        input = self.transform.tokens(input)
        if self.activation is not None and self.input_scale is not None:
            input = fake_quantize_static(input, self.activation.bits, self.input_scale)
        elif self.activation is not None:
            assert not self.activation.static
            input = fake_quantize_tokens(input, self.activation.bits, self.activation.group, self.activation_clip)
        return quantized_linear(input.to(dtype), self.weight, self.bias)
