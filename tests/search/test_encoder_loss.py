"""The composite loss and the rounding that it differentiates."""

import math

import pytest
import torch

from optimum_qvlm.kernels import fake_quantize_static, fake_quantize_tokens
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight, quantize_weight
from optimum_qvlm.quant.entropy import conditional_entropy, grid_positions, joint_table, marginal_entropy
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.encoder_loss import (
    LossTerms,
    WeightStart,
    answer_loss,
    jacobian_weights,
    learned_clip,
    learned_static,
    learned_tokens,
    relative_error,
    round_through,
    soft_dependency,
    transformed,
    weighted_entropy,
)
from optimum_qvlm.settings import EncoderOptions
from optimum_qvlm.spec import ActivationSpec, WeightSpec

SPECS = [
    WeightSpec(bits=4, group=16),
    WeightSpec(bits=8),
    WeightSpec(bits=4, group=16, symmetric=False),
    WeightSpec(bits=3, symmetric=False),
]
SPEC_NAMES = ["groups", "rows", "zero points", "three bits"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slope(function, at, step=1e-3):
    """Central finite difference of a scalar function of a tensor, element by element."""
    found = torch.zeros_like(at)
    for place in range(at.numel()):
        change = torch.zeros_like(at).flatten()
        change[place] = step
        change = change.reshape(at.shape)
        found.view(-1)[place] = (function(at + change) - function(at - change)) / (2 * step)
    return found


def gradient(function, at):
    at = at.clone().requires_grad_()
    function(at).backward()
    return at.grad


@pytest.mark.parametrize("spec", SPECS, ids=SPEC_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True])
def test_weights_start_at_what_the_search_found_bit_for_bit(spec, dtype, signed):
    """Else the step would undo the search before it begins."""
    weight = noise(6, 32).to(dtype)
    found = quantize_weight(weight, spec, clip=0.8, signed=signed)
    start = WeightStart.of(found, weight.float(), spec)
    none = torch.zeros(found.scale.shape)

    again = start.rounded(weight.float(), none)

    assert start.offset is None
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scale, found.scale)
    assert torch.equal(start.value(weight.float(), none), dequantize_weight(found))


@pytest.mark.parametrize("spec", SPECS, ids=SPEC_NAMES)
def test_codes_that_are_not_the_nearest_are_kept(spec):
    """Error feedback chooses such codes, and they carry its gain."""
    weight = noise(6, 32)
    found = quantize_weight(weight, spec)
    flipped = torch.where(found.codes > 0, found.codes - 1, found.codes + 1)
    found = QuantizedWeight(flipped, found.scale, found.zero_point)

    start = WeightStart.of(found, weight, spec)

    assert start.offset is not None
    assert torch.equal(start.rounded(weight, torch.zeros(found.scale.shape)).codes, flipped)


@pytest.mark.parametrize("spec", SPECS, ids=SPEC_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_is_what_was_learned_on(spec, dtype):
    """The loss of the last step must be that of the saved model."""
    weight = noise(6, 32)
    start = WeightStart.of(quantize_weight(weight, spec, scale_dtype=dtype, signed=True), weight, spec)
    change = 0.3 * noise(*start.scale.shape, seed=1)

    rounded = start.rounded(weight, change)

    assert torch.equal(dequantize_weight(rounded), start.value(weight, change))
    assert rounded.scale.dtype == dtype
    low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    assert low <= int(rounded.codes.min()) and int(rounded.codes.max()) <= high


def test_a_larger_scale_rounds_to_nearest_on_its_own_grid():
    weight, spec = noise(4, 16), WeightSpec(bits=4)
    found = quantize_weight(weight, spec)

    rounded = WeightStart.of(found, weight, spec).rounded(weight, torch.full((4, 1), math.log(1.25)))

    expected = torch.round(weight / rounded.scale).clamp(-8, 7).to(torch.int8)
    assert torch.allclose(rounded.scale, found.scale * 1.25)
    assert torch.equal(rounded.codes, expected)


@pytest.mark.parametrize("spec", [WeightSpec(bits=8), WeightSpec(bits=8, symmetric=False)], ids=["centred", "zero"])
def test_the_gradient_of_a_scale_agrees_with_finite_differences(spec):
    """Rounding makes the error a staircase of the scale: over many weights, wide steps see its slope."""
    weight = noise(1, 40_000)
    found = quantize_weight(weight, spec)
    start = WeightStart.of(found, weight, spec)

    def error(change):
        return (start.value(weight, change.float()) - weight).square().sum()

    for at in (0.0, -0.6):
        place = torch.full((1, 1), at)
        assert float(gradient(error, place)) == pytest.approx(float(slope(error, place, 0.03)), rel=0.1)


def test_the_gradient_of_a_clip_agrees_with_finite_differences():
    x, spec = noise(400, 64), ActivationSpec(bits=6, group=16)

    def error(change):
        return (learned_tokens(x, spec, change.float(), 0.9) - x).square().sum()

    for at in (-0.05, -0.4):
        place = torch.tensor([at])
        assert float(gradient(error, place)) == pytest.approx(float(slope(error, place, 0.04)), rel=0.1)


def test_the_gradient_of_a_static_scale_agrees_with_finite_differences():
    x, spec = noise(400, 64), ActivationSpec(bits=6, static=True)
    scale = torch.tensor([float(x.abs().max()) / 31])

    def error(change):
        return (learned_static(x, spec, change.float(), scale) - x).square().sum()

    for at in (-0.05, -0.6):
        place = torch.tensor([at])
        assert float(gradient(error, place)) == pytest.approx(float(slope(error, place, 0.04)), rel=0.1)


@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 32)], ids=["tokens", "rows of tokens"])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_as_at_run_time(shape, group, dtype, fitted):
    x = noise(*shape).to(dtype)
    x[0] = 0
    log_clip = torch.tensor([-0.2], requires_grad=True)

    found = learned_tokens(x, ActivationSpec(bits=4, group=group, fitted=fitted), log_clip, 0.9)

    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize_tokens(x, 4, group, learned_clip(log_clip, 0.9), fitted=fitted))


def test_static_activations_are_rounded_as_at_run_time():
    x, log_scale = noise(3, 8), torch.tensor([0.1], requires_grad=True)

    found = learned_static(x, ActivationSpec(bits=4, static=True), log_scale, torch.tensor([0.3]))

    assert torch.equal(found, fake_quantize_static(x, 4, 0.3 * torch.tensor([0.1]).exp()))


def test_clipped_activations_pass_no_gradient_and_others_all():
    x = torch.tensor([[1.0, 0.3, -1.0]], requires_grad=True)

    learned_tokens(x, ActivationSpec(bits=4), torch.tensor([math.log(0.5)]), 1.0).sum().backward()

    assert x.grad.tolist() == [[0.0, 1.0, 0.0]]


def test_the_gradient_of_a_clip_of_a_fitted_grid_points_downhill():
    """Sign and size of its scales jump where another candidate is best, so differences are taken over a wide step."""
    x, spec = noise(4000, 64), ActivationSpec(bits=4, group=16, fitted=True)

    def error(change):
        return (learned_tokens(x, spec, change.float(), 0.9) - x).square().sum()

    place = torch.tensor([-0.5])
    assert float(gradient(error, place)) < 0
    assert float(slope(error, place, 0.2)) < 0


def test_a_learned_clip_never_exceeds_the_peak():
    assert learned_clip(torch.tensor([5.0]), 0.9) == 1.0


def test_rounding_has_the_gradient_of_the_identity():
    x = torch.tensor([0.4, 0.5, 1.5, -2.6], requires_grad=True)

    rounded = round_through(x)
    rounded.sum().backward()

    assert rounded.tolist() == [0.0, 0.0, 2.0, -3.0]
    assert x.grad.tolist() == [1.0] * 4


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("rotation", [None, 8])
def test_the_transform_is_that_of_the_site(equalized, rotation):
    x, equalizer = noise(3, 16), noise(16, seed=1).exp() if equalized else None

    assert torch.equal(transformed(x, equalizer, rotation), SiteTransform(equalizer, rotation).tokens(x))


def test_an_equalizer_gets_gradients_through_the_rotation():
    x = noise(5, 16)

    def energy(equalizer):
        return (transformed(x, equalizer, 8) ** 3).sum()

    at = noise(16, seed=1).exp()
    assert torch.allclose(gradient(energy, at), slope(energy, at, 1e-2), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("softness", ["step_squared", "step"])
def test_the_soft_dependency_is_the_one_of_the_partition(softness):
    """Otherwise the step would lower something else than what the blocks are made by."""
    first, second = (grid_positions(noise(50, 8, seed=seed), 4) for seed in (0, 1))

    joint = conditional_entropy(joint_table(first, second, softness))
    assert float(soft_dependency(first, second, softness)) == pytest.approx(joint, rel=1e-4)
    alone = marginal_entropy(second, softness)
    assert float(soft_dependency(None, second, softness)) == pytest.approx(alone, rel=1e-4)


def test_the_gradient_of_the_dependency_agrees_with_finite_differences():
    """It is smooth: no rounding in it."""
    first, later = noise(6, 4), noise(6, 4, seed=1)

    def dependency(x):
        return soft_dependency(grid_positions(first, 3, static=True), grid_positions(x, 3, static=True))

    assert torch.allclose(gradient(dependency, later), slope(dependency, later, 1e-2), rtol=3e-2, atol=1e-3)


def test_levels_that_nothing_lies_near_do_no_harm():
    """At six bits most probabilities underflow, and log 0 would make the gradient NaN."""
    x = noise(20, 4).requires_grad_()

    soft_dependency(grid_positions(x, 6), grid_positions(2 * x, 6)).backward()

    assert bool(torch.isfinite(x.grad).all())


def test_the_loss_adds_its_terms_with_their_factors():
    terms = LossTerms(**{n: torch.tensor(v) for n, v in zip(TERMS, (1.0, 2.0, 4.0, 8.0), strict=True)})
    options = EncoderOptions(entropy_weight=0.5, error_weight=0.25, final_share=3.0)

    assert float(terms.total(options)) == 1 + 0.5 * 2 + 0.25 * (4 + 3 * 8)


TERMS = ("answer", "entropy", "vision", "final")


def test_the_gradient_of_the_whole_loss_agrees_with_finite_differences():
    """A toy of two layers and a head whose one equalizer reaches all four terms, without rounding in the way."""
    x, head, labels = noise(12, 8), noise(8, 5, seed=1), torch.arange(12) % 5
    first, second = noise(8, 8, seed=2) / 3, noise(8, 8, seed=3) / 3
    options = EncoderOptions(entropy_weight=0.7, error_weight=0.9, final_share=0.5)
    wanted = x @ first, torch.tanh(x @ first) @ second

    def loss(equalizer):
        vision = transformed(x, equalizer, 4) @ transformed(first.T, None, 4).T
        final = torch.tanh(vision) @ second
        entropy = soft_dependency(grid_positions(vision, 3, static=True), grid_positions(final, 3, static=True))
        terms = LossTerms(
            answer=answer_loss(final @ head, labels),
            entropy=weighted_entropy([entropy], [0.6]),
            vision=relative_error(vision, wanted[0]),
            final=relative_error(final, wanted[1]),
        )
        return terms.total(options)

    at = 1.3 + 0.1 * noise(8, seed=4)
    assert torch.allclose(gradient(loss, at), slope(loss, at, 2e-3), rtol=3e-2, atol=2e-3)


def test_errors_are_relative():
    """Units must cancel, or the factors would mean something else on every model."""
    found, wanted = noise(4, 3), noise(4, 3, seed=1)

    assert float(relative_error(7 * found, 7 * wanted)) == pytest.approx(float(relative_error(found, wanted)))
    assert float(relative_error(torch.zeros(2), torch.ones(2))) == 1.0
    assert float(relative_error(torch.zeros(2), torch.zeros(2))) == 0.0


def test_a_batch_without_answers_has_no_answer_loss():
    logits = torch.zeros(0, 7, requires_grad=True)

    loss = answer_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()

    assert float(loss.detach()) == 0.0


def test_jacobian_norms_become_weights_that_sum_to_one():
    assert jacobian_weights([1.0, 3.0]) == [0.25, 0.75]
    assert jacobian_weights([0.0, 0.0]) == [0.5, 0.5]


def test_no_pairs_have_no_entropy():
    assert float(weighted_entropy([], [])) == 0.0
