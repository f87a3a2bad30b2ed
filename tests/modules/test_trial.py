"""A trial linear must be what the finished module will be, or the search measures something else."""

import pytest
import torch
from torch import Tensor, nn

from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.modules.trial import TrialLinear
from optimum_qvlm.quant.affine import QuantizedWeight, quantize_weight
from optimum_qvlm.quant.observers import static_scale
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.spec import ActivationSpec, WeightSpec


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(64, 24, bias=bias, dtype=dtype)
    linear.weight.data = normal(24, 64, seed=1).to(dtype)
    return linear


def rounded(linear: nn.Linear, spec: WeightSpec, transform: SiteTransform | None = None) -> QuantizedWeight:
    weight = linear.weight.detach()
    folded = weight if transform is None else transform.fold(weight)
    return quantize_weight(folded, spec, scale_dtype=weight.dtype)


ACTIVATIONS = {
    "none": None,
    "token": ActivationSpec(bits=8),
    "group": ActivationSpec(bits=4, group=16),
    "static": ActivationSpec(bits=6, static=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transformed", [True, False])
def test_it_gives_exactly_what_the_quantized_linear_gives(dtype, activation, symmetric, transformed):
    linear, spec = make_linear(dtype), ACTIVATIONS[activation]
    x = normal(3, 5, 64).to(dtype)
    weight_spec = WeightSpec(bits=4, group=16, symmetric=symmetric)
    transform = SiteTransform(normal(64, seed=2).abs() + 0.5, 16) if transformed else SiteTransform()
    scale = static_scale(x, 6, 0.99) if activation == "static" else None
    weight = rounded(linear, weight_spec, transform if transformed else None)

    trial = TrialLinear.of(linear, spec)
    trial.set_rounding(weight, 0.8, transform, scale)

    format = LinearFormat(
        weight=weight_spec,
        activation=spec,
        activation_clip=0.8,
        equalized=transformed,
        rotation=transform.rotation,
    )
    final = QuantLinear.from_quantized(
        weight, linear.bias, format, input_equalizer=transform.equalizer, input_scale=scale
    )
    assert trial(x).dtype == dtype
    assert torch.equal(trial(x), final(x))


def test_the_rounding_can_be_exchanged():
    """Candidates are tried one after the other in the same module."""
    linear, x = make_linear(bias=False), normal(4, 64)
    trial = TrialLinear.of(linear, None)

    outputs = []
    for bits in (4, 8, 4):
        trial.set_rounding(rounded(linear, WeightSpec(bits=bits)), 1.0, SiteTransform(), None)
        outputs.append(trial(x))

    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_it_looks_like_the_linear_that_it_stands_in_for():
    """Model code asks for these."""
    linear = make_linear(torch.bfloat16)
    trial = TrialLinear.of(linear, None)
    trial.set_rounding(rounded(linear, WeightSpec(bits=4)), 1.0, SiteTransform(), None)

    assert isinstance(trial, nn.Linear)
    assert (trial.in_features, trial.out_features, trial.weight.dtype) == (64, 24, torch.bfloat16)
    assert trial.bias is linear.bias
    assert not trial.weight.requires_grad


def test_the_linear_itself_is_left_alone():
    linear = make_linear()
    before = linear.weight.detach().clone()

    TrialLinear.of(linear, None).set_rounding(rounded(linear, WeightSpec(bits=2)), 1.0, SiteTransform(), None)

    assert torch.equal(linear.weight, before)
