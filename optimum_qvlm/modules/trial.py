"""A linear that tries rounding functions: what `QuantLinear` computes, over a dense weight that can be exchanged."""

from typing import Self

from torch import Tensor, nn

from optimum_qvlm.kernels import NOTHING, Rounding, quantized_linear
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.spec import ActivationSpec


class TrialLinear(nn.Linear):
    """`y = Q(x T) dequantize(W)^T + b` with the weight kept dequantized, on its own device.

    Gives exactly what a packed `QuantLinear` of the same rounding function gives. The bias is shared with the linear
    that it stands in for, and `weight` has its dtype; products take the fp32 values in `dense`.
    """

    dense: Tensor
    activation: ActivationSpec | None
    rounding: Rounding

    @classmethod
    def of(cls, linear: nn.Linear, activation: ActivationSpec | None) -> Self:
        """A stand-in for `linear`, which takes its first rounding function from `set_rounding`."""
        trial = cls(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        trial.bias = linear.bias
        trial.activation, trial.rounding = activation, NOTHING
        return trial

    def set_rounding(
        self, weight: QuantizedWeight, activation_clip: float, transform: SiteTransform, input_scale: Tensor | None
    ) -> None:
        """Round as told from now on. `weight` has the inverse of `transform` folded in."""
        spec = self.activation
        assert spec is None or spec.static == (input_scale is not None)
        self.dense = dequantize_weight(weight)
        self.weight = nn.Parameter(self.dense.to(self.weight.dtype), requires_grad=False)
        self.rounding = Rounding.of(
            spec,
            clip=activation_clip,
            scale=input_scale,
            equalizer=transform.equalizer,
            rotation=transform.rotation,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Product of the rounded input [..., in_features] with the weight, plus bias, in the input's dtype."""
        return quantized_linear(input, self.dense, self.bias, self.rounding)
