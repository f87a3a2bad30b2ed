"""Static ranges, and the candidates that a site gives to a joint search."""

from dataclasses import replace

import pytest
import torch

from optimum_qvlm.kernels import fake_quantize_static, fake_quantize_tokens
from optimum_qvlm.quant.affine import dequantize_weight
from optimum_qvlm.quant.observers import static_scale
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.site import ClipGrids, SiteOptions, round_site, search_site
from optimum_qvlm.search.site_problem import SiteProblem
from optimum_qvlm.spec import ActivationSpec
from tests.search.test_site import PLAIN, ROUNDING_NOISE, heavy_tailed, make_problem, normal, output_error

STATIC = SiteOptions(
    clips=ClipGrids(activation=(1.0, 0.995, 0.99, 0.985, 0.98), activation_margin=0.0), transforms=None, feedback=None
)


def static_problem(bits: int = 4, **changes) -> SiteProblem:
    return replace(make_problem(**changes), activation=ActivationSpec(bits=bits, static=True))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_static_bounds_are_quantiles_of_the_inputs(bits, seed):
    """And never worse than the whole range."""
    problem = static_problem(bits, inputs=heavy_tailed(60, 64, seed=seed), seed=seed)

    choice = search_site(problem, STATIC)

    assert choice.activation_clip in STATIC.clips.activation
    assert torch.equal(choice.input_scale, static_scale(problem.inputs, bits, choice.activation_clip))
    assert choice.error <= choice.nearest_error
    rounded = fake_quantize_static(problem.inputs, bits, choice.input_scale)
    change = norm = 0.0
    for name, weight in problem.weights.items():
        expected = problem.inputs.double() @ weight.double().T
        change += float(
            (rounded.double() @ dequantize_weight(choice.weights[name]).double().T - expected).square().sum()
        )
        norm += float(expected.square().sum())
    assert choice.error == pytest.approx(change / norm, rel=ROUNDING_NOISE)


def test_heavy_tails_make_static_bounds_worth_clipping():
    choice = search_site(static_problem(4, inputs=heavy_tailed(60, 64)), STATIC)

    assert choice.activation_clip < 1.0
    assert choice.error < 0.9 * choice.nearest_error


def test_dynamic_choices_carry_no_scale():
    assert search_site(make_problem(), PLAIN).input_scale is None


@pytest.mark.parametrize("activation_bits", [None, 4, 8])
def test_the_search_rounds_its_weights_as_a_site_with_that_clip(activation_bits):
    """So the candidates of a joint search differ from the layer-wise optimum by their clip alone."""
    problem = make_problem(bits=3, activation_bits=activation_bits)

    choice = search_site(problem, PLAIN)
    again = round_site(problem, PLAIN, activation_clip=choice.activation_clip, transform=choice.transform)

    assert again.error == choice.error and again.weight_clips == choice.weight_clips
    assert all(torch.equal(again.weights[name].codes, choice.weights[name].codes) for name in choice.weights)


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("activation_bits", [None, 4, 8])
def test_weights_are_rounded_for_the_clip_they_are_given(clip, activation_bits):
    problem = make_problem(activation_bits=activation_bits)

    choice = round_site(problem, PLAIN, activation_clip=clip, transform=SiteTransform())

    assert choice.activation_clip == clip
    assert choice.error == pytest.approx(output_error(problem, choice), rel=ROUNDING_NOISE)


def test_a_transform_is_folded_into_the_weights():
    """Outliers in a few channels are spread over their block, so fewer bits are lost on all others."""
    inputs = normal(60, 64)
    inputs[:, ::16] *= 30
    problem = make_problem(activation_bits=4, group=None, bits=8, inputs=inputs)
    transform = SiteTransform(rotation=64)

    plain, rotated = (
        round_site(problem, PLAIN, activation_clip=1.0, transform=t) for t in (SiteTransform(), transform)
    )

    assert rotated.transform is transform
    assert rotated.error < 0.7 * plain.error
    x = fake_quantize_tokens(transform.tokens(inputs), 4, None, 1.0)
    expected = inputs @ problem.weights["q"].T
    actual = x @ dequantize_weight(rotated.weights["q"]).T
    assert float((actual - expected).square().sum() / expected.square().sum()) == pytest.approx(rotated.error, rel=0.3)
