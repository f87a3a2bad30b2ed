"""Learnable linears against the quantized ones that they stand in for and become."""

import math

import pytest
import torch
from torch import nn

from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.pipeline.encoder.modules import LARGEST_CHANGE, SMALLEST_CLIP, LearnedLinear, LearnedSite
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.spec import ActivationSpec, WeightSpec

CASES = {
    "w4a16": LinearFormat(weight=WeightSpec(bits=4, group=16)),
    "w4a4": LinearFormat(
        weight=WeightSpec(bits=4, group=16), activation=ActivationSpec(bits=4, group=16), activation_clip=0.9
    ),
    "w8a8": LinearFormat(weight=WeightSpec(bits=8), activation=ActivationSpec(bits=8)),
    "zero points": LinearFormat(weight=WeightSpec(bits=4, symmetric=False), activation=ActivationSpec(bits=8)),
    "static": LinearFormat(weight=WeightSpec(bits=4, group=16), activation=ActivationSpec(bits=4, static=True)),
    "equalized": LinearFormat(weight=WeightSpec(bits=4), activation=ActivationSpec(bits=4), equalized=True),
    "rotated": LinearFormat(
        weight=WeightSpec(bits=4, group=16), activation=ActivationSpec(bits=4), equalized=True, rotation=16
    ),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    """A quantized linear, its full-precision weight, and inputs."""
    format, weight = request.param, noise(12, 32)
    equalizer = noise(32, seed=1).mul(0.3).exp() if format.equalized else None
    folded = SiteTransform(equalizer, format.rotation).fold(weight)
    static = format.activation is not None and format.activation.static
    start = QuantLinear.from_quantized(
        quantize_weight(folded, format.weight, clip=0.9, signed=True),
        noise(12, seed=2),
        format,
        input_equalizer=equalizer,
        input_scale=torch.tensor([0.4]) if static else None,
    )
    return start, weight, noise(5, 32, seed=3)


def parameters(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def test_the_start_is_what_the_search_found(case):
    start, weight, x = case

    learned = LearnedLinear(start, weight, LearnedSite(start))

    assert torch.equal(learned(x), start(x))


def test_packing_the_start_changes_no_tensor(case):
    """So a step that finds nothing better leaves the bytes of the model as they were."""
    start, weight, _ = case

    packed = LearnedLinear(start, weight, LearnedSite(start)).packed()

    before, after = start.state_dict(), packed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert packed.format == start.format


def test_what_is_packed_computes_what_was_learned(case):
    start, weight, x = case
    learned = LearnedLinear(start, weight, LearnedSite(start))
    with torch.no_grad():
        for number, parameter in enumerate(parameters(learned)):
            parameter.copy_(-0.2 * noise(*parameter.shape, seed=number).abs())

    packed = learned.packed()

    assert not torch.equal(packed(x), start(x))
    assert torch.equal(packed(x), learned(x))
    assert isinstance(packed, nn.Linear) and packed.format.weight == start.format.weight


def test_every_parameter_gets_a_gradient(case):
    start, weight, x = case
    learned = LearnedLinear(start, weight, LearnedSite(start))

    (learned(x) - x @ weight.T).square().sum().backward()

    expected = {"log_scale"}
    expected |= {"site.log_clip"} if start.format.activation is not None else set()
    expected |= {"site.log_equalizer"} if start.format.equalized else set()
    actual = {name: parameter.grad for name, parameter in learned.named_parameters()}
    assert set(actual) == expected
    assert all(bool(gradient.abs().sum() > 0) for gradient in actual.values())


def test_descending_lowers_the_error_of_the_output(case):
    """The gradients point the right way together."""
    start, weight, x = case
    x = noise(200, 32, seed=4)
    learned = LearnedLinear(start, weight, LearnedSite(start))
    optimizer = torch.optim.Adam(learned.parameters(), lr=5e-3)

    def error(module):
        return (module(x) - nn.functional.linear(x, weight, start.bias)).square().sum()

    for _ in range(40):
        optimizer.zero_grad()
        error(learned).backward()
        optimizer.step()
        learned.keep_in_bounds()
        learned.site.keep_in_bounds()

    assert float(error(learned.packed())) < float(error(start))


@pytest.mark.parametrize("far", [-9.0, 9.0])
def test_parameters_stay_where_they_mean_something(case, far):
    start, weight, _ = case
    learned = LearnedLinear(start, weight, LearnedSite(start))
    with torch.no_grad():
        for parameter in parameters(learned):
            parameter.fill_(far)

    learned.keep_in_bounds()
    learned.site.keep_in_bounds()

    packed = learned.packed()
    assert SMALLEST_CLIP - 1e-6 <= packed.format.activation_clip <= 1.0
    assert float(learned.log_scale.detach().abs().max()) <= LARGEST_CHANGE + 1e-6
    if packed.input_scale is not None:
        assert 0.2 - 1e-6 <= float(packed.input_scale) <= 0.8 + 1e-6
    if packed.input_equalizer is not None:
        assert float((packed.input_equalizer / start.input_equalizer).log().abs().max()) <= LARGEST_CHANGE + 1e-6


def test_linears_of_a_site_share_what_is_learned_about_its_activation(case):
    start, weight, _ = case
    site = LearnedSite(start)
    first, second = LearnedLinear(start, weight, site), LearnedLinear(start, 2 * weight, site)
    with torch.no_grad():
        for parameter in parameters(site):
            parameter.fill_(-0.1)

    assert first.packed().format.activation_clip == second.packed().format.activation_clip
    if start.format.equalized:
        assert torch.equal(first.packed().input_equalizer, second.packed().input_equalizer)


@pytest.mark.parametrize("signed", [False, True])
def test_the_reported_weight_clip_is_the_share_of_the_range(signed):
    """It is for reading, and must stay what the report says that it is."""
    start = QuantLinear.from_quantized(
        quantize_weight(noise(12, 32), CASES["w4a16"].weight, clip=0.8, signed=signed), None, CASES["w4a16"]
    )
    learned = LearnedLinear(start, noise(12, 32), LearnedSite(start))

    assert learned.weight_clip() == pytest.approx(0.8)
    with torch.no_grad():
        learned.log_scale.fill_(math.log(1.1))
    assert learned.weight_clip() == pytest.approx(0.88)
