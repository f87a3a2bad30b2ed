"""The search of one site: never worse than rounding to nearest, and clearly better where there is something to win."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import fake_quantize_tokens
from optimum_qvlm.kernels.levels import common_step
from optimum_qvlm.quant.affine import dequantize_weight, quantize_weight
from optimum_qvlm.search import error_feedback as rounding
from optimum_qvlm.search.error_feedback import FeedbackOptions
from optimum_qvlm.search.site import ClipGrids, SiteOptions, round_site, round_to_nearest, search_site
from optimum_qvlm.search.site_problem import SiteChoice, SiteProblem
from optimum_qvlm.search.transforms import KINDS, TransformOptions
from optimum_qvlm.spec import ActivationSpec, WeightSpec

PLAIN = SiteOptions(transforms=None, feedback=None)
"""The clips of the paper alone."""

ROUNDING_NOISE = 1e-4
"""Relative; the error is a sum over tokens and channels in fp32, taken here in another order and in fp64."""


def clips_only(**grids: tuple[float, ...]) -> SiteOptions:
    return SiteOptions(clips=ClipGrids(**grids), transforms=None, feedback=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Normal values of which a few are very large, as in weights of real language models."""
    return normal(*shape, seed=seed) ** 3


def make_problem(
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    activation_bits: int | None = 8,
    weights: dict[str, Tensor] | None = None,
    inputs: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> SiteProblem:
    """Two linears of 24 and 8 rows that read 40 tokens of 64 channels."""
    if weights is None:
        weights = {"q": heavy_tailed(24, 64, seed=seed + 1), "k": heavy_tailed(8, 64, seed=seed + 2)}
    spec = WeightSpec(bits=bits, group=group, symmetric=symmetric)
    activation = None
    if activation_bits is not None:
        activation = ActivationSpec(bits=activation_bits, group=group if activation_bits < 8 else None)
    return SiteProblem(
        inputs=normal(40, 64, seed=seed) if inputs is None else inputs,
        weights=weights,
        specs=dict.fromkeys(weights, spec),
        activation=activation,
        scale_dtype=scale_dtype,
    )


def output_error(problem: SiteProblem, choice: SiteChoice) -> float:
    """The error by its definition: of the outputs, relative, in double precision."""
    inputs, spec = problem.inputs, problem.activation
    rounded = choice.transform.tokens(inputs)
    if spec is not None:
        rounded = fake_quantize_tokens(rounded, spec.bits, spec.group, choice.activation_clip)
    error = norm = 0.0
    for name, weight in problem.weights.items():
        expected = problem.target_inputs.double() @ weight.double().T
        actual = rounded.double() @ dequantize_weight(choice.weights[name]).double().T
        error += float((actual - expected).square().sum())
        norm += float(expected.square().sum())
    return error / norm


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 16, 32]),
    activation_bits=st.sampled_from([None, 4, 6, 8]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_choice_is_never_worse_than_nearest(seed, bits, group, activation_bits, symmetric, scale_dtype):
    """The invariant of the search; and its errors are those of what it returns."""
    problem = make_problem(
        seed=seed,
        bits=bits,
        group=group,
        activation_bits=activation_bits,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
    )

    choice = search_site(problem, PLAIN)

    assert choice.error <= choice.nearest_error
    nearest = round_to_nearest(problem.weights, problem.specs, scale_dtype)
    assert choice.error == pytest.approx(output_error(problem, choice), rel=ROUNDING_NOISE)
    assert choice.nearest_error == pytest.approx(output_error(problem, nearest), rel=ROUNDING_NOISE)


@pytest.mark.parametrize("bits, gain", [(2, 0.9), (3, 0.9), (4, 0.95)])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_are_worth_clipping(bits, gain, group, activation_bits, seed):
    """Few large weights make the steps of all others coarse."""
    choice = search_site(make_problem(bits=bits, group=group, activation_bits=activation_bits, seed=seed), PLAIN)

    assert choice.error < gain * choice.nearest_error
    assert all(clip < 1.0 for clip in choice.weight_clips.values())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("activation_bits", [None, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_problem_has_the_same_answer(bits, activation_bits, symmetric):
    """Checkpoints must be reproducible to the byte."""
    first, second = (
        search_site(make_problem(bits=bits, activation_bits=activation_bits, symmetric=symmetric), PLAIN)
        for _ in range(2)
    )

    assert (first.activation_clip, first.weight_clips) == (second.activation_clip, second.weight_clips)
    assert (first.error, first.nearest_error) == (second.error, second.nearest_error)
    for name, quantized in first.weights.items():
        assert torch.equal(quantized.codes, second.weights[name].codes)
        assert torch.equal(quantized.scale, second.weights[name].scale)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 32])
def test_weights_that_lie_on_a_grid_are_not_clipped(bits, group):
    """A grid with zero point that covers its range fits exactly; every clip would saturate its ends."""
    codes = torch.randint(0, 2**bits, (8, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    weight = (codes - 2 ** (bits - 1)).float() / 16
    problem = make_problem(bits=bits, group=group, symmetric=False, activation_bits=None, weights={"q": weight})

    choice = search_site(problem, PLAIN)

    assert choice.weight_clips == {"q": 1.0}
    assert torch.equal(dequantize_weight(choice.weights["q"]), weight)
    assert choice.error == choice.nearest_error == 0.0


@pytest.mark.parametrize("zeros", ["weights", "inputs", "both"])
@pytest.mark.parametrize("activation_bits", [None, 4, 8])
def test_zeros_give_nearest_and_no_error(zeros, activation_bits):
    """A tie goes to the full range, and nothing divides by zero."""
    weights = {"q": torch.zeros(4, 64)} if zeros != "inputs" else None
    inputs = torch.zeros(10, 64) if zeros != "weights" else None

    choice = search_site(make_problem(weights=weights, inputs=inputs, activation_bits=activation_bits), PLAIN)

    assert choice.error == choice.nearest_error == 0.0
    assert choice.activation_clip == 1.0
    assert all(clip == 1.0 for clip in choice.weight_clips.values())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_an_activation_grid_the_inputs_are_left_alone(bits):
    """Weight-only schemes: the clip is not searched."""
    problem = make_problem(bits=bits, activation_bits=None)

    choice = search_site(problem, clips_only(activation=(0.5,)))

    assert choice.activation_clip == 1.0
    assert choice.error == pytest.approx(output_error(problem, choice), rel=ROUNDING_NOISE)


def test_an_outlier_that_no_weight_reads_is_clipped():
    """One entry per token makes the steps of all others coarse; here losing it costs nothing."""
    inputs = normal(40, 64)
    inputs[:, 5] = 8.0
    weight = normal(16, 64, seed=1)
    weight[:, 5] = 0
    problem = make_problem(activation_bits=4, group=None, bits=8, weights={"q": weight}, inputs=inputs)

    choice = search_site(problem, PLAIN)

    assert choice.activation_clip == 0.5
    assert choice.error < 0.5 * choice.nearest_error


def test_an_outlier_that_the_weights_read_is_kept():
    """The activation clip is chosen by its effect on the output, not on the input."""
    inputs = normal(40, 64)
    inputs[:, 5] = 8.0
    weight = normal(16, 64, seed=1)
    weight[:, 5] = 20.0
    problem = make_problem(activation_bits=8, group=None, bits=8, weights={"q": weight}, inputs=inputs)

    assert search_site(problem, PLAIN).activation_clip == 1.0


@pytest.mark.parametrize("grid", [(1.0,), (1.0, 0.8), (1.0, 0.9, 0.7, 0.3)])
def test_clips_come_from_the_grids(grid):
    problem = make_problem(bits=3, activation_bits=4)

    choice = search_site(problem, clips_only(activation=grid, weight=grid))

    assert choice.activation_clip in grid
    for clip in choice.weight_clips.values():
        assert min(grid) - 1e-6 <= clip <= max(grid)


def test_a_grid_of_one_is_rounding_to_nearest():
    problem = make_problem(bits=3, activation_bits=4)

    choice = search_site(problem, clips_only(activation=(1.0,), weight=(1.0,)))

    nearest = round_to_nearest(problem.weights, problem.specs, torch.float32)
    assert choice.error == choice.nearest_error
    for name, quantized in choice.weights.items():
        assert torch.equal(quantized.codes, nearest.weights[name].codes)
        assert torch.equal(quantized.scale, nearest.weights[name].scale)


@pytest.mark.parametrize("group", [None, 16, 64])
@pytest.mark.parametrize("activation_bits", [None, 2])
def test_each_weight_clip_is_the_best_of_its_row_and_group(group, activation_bits, monkeypatch):
    """Checked by brute force, on the rounded inputs; slices of rows must not change the answer."""
    monkeypatch.setattr(rounding, "ROWS_AT_ONCE", 7)
    problem = make_problem(bits=3, group=group, activation_bits=activation_bits)
    weight, spec = problem.weights["q"], WeightSpec(bits=3)

    choice = search_site(problem, PLAIN)

    inputs = problem.inputs
    if activation_bits is not None:
        inputs = fake_quantize_tokens(inputs, activation_bits, group, choice.activation_clip)
    width = group or 64
    for row in range(24):
        for start in range(0, 64, width):
            channels = slice(start, start + width)
            part, seen = weight[row : row + 1, channels], inputs[:, channels].double()

            def error(clip: float, part: Tensor = part, seen: Tensor = seen) -> float:
                rounded = quantize_weight(part, spec, clip=clip)
                return float((seen @ (part - dequantize_weight(rounded)).double().T).square().sum())

            expected = quantize_weight(part, spec, clip=min(ClipGrids().weight, key=error))
            assert torch.equal(choice.weights["q"].codes[row, channels], expected.codes[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_and_weights_are_searched(dtype):
    """Models are calibrated in the dtype in which they were loaded."""
    problem = make_problem(
        inputs=normal(40, 64).to(dtype), weights={"q": heavy_tailed(8, 64, seed=1).to(dtype)}, scale_dtype=dtype
    )

    choice = search_site(problem, PLAIN)

    assert choice.weights["q"].scale.dtype == dtype
    assert choice.error <= choice.nearest_error < 1.0


@pytest.mark.parametrize("tokens", [1, 2, 500])
def test_any_number_of_tokens_is_enough(tokens):
    choice = search_site(make_problem(inputs=normal(tokens, 64)), PLAIN)

    assert 0.0 <= choice.error <= choice.nearest_error


@pytest.mark.parametrize("exponent", [-8, 8])
def test_the_unit_of_the_activations_does_not_matter(exponent):
    plain = search_site(make_problem(activation_bits=4), PLAIN)
    scaled = search_site(make_problem(activation_bits=4, inputs=normal(40, 64) * 2.0**exponent), PLAIN)

    assert (scaled.activation_clip, scaled.weight_clips) == (plain.activation_clip, plain.weight_clips)
    assert scaled.error == pytest.approx(plain.error, rel=ROUNDING_NOISE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_to_nearest_is_the_plain_rounding_of_every_weight(symmetric, scale_dtype):
    """It sees no data, so it reports no error."""
    problem = make_problem(symmetric=symmetric)

    choice = round_to_nearest(problem.weights, problem.specs, scale_dtype)

    assert choice.activation_clip == 1.0
    assert choice.weight_clips == {"q": 1.0, "k": 1.0}
    assert math.isnan(choice.error) and math.isnan(choice.nearest_error)
    for name, weight in problem.weights.items():
        expected = quantize_weight(weight, problem.specs[name], scale_dtype=scale_dtype)
        assert torch.equal(choice.weights[name].codes, expected.codes)
        assert torch.equal(choice.weights[name].scale, expected.scale)


@pytest.mark.parametrize("options", [PLAIN, SiteOptions()], ids=["clips", "all"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_on_two_levels_are_those_of_every_method(scale_dtype, options):
    """Round-to-nearest, clips alone, and error feedback behind transforms."""
    plain = make_problem(weights={"q": normal(24, 64, seed=1), "k": normal(8, 64, seed=2)}, scale_dtype=scale_dtype)
    problem = replace(plain, specs={name: replace(spec, two_level=True) for name, spec in plain.specs.items()})

    nearest = round_to_nearest(problem.weights, problem.specs, scale_dtype)
    actual = search_site(problem, options)

    for choice in (nearest, actual):
        for weight in choice.weights.values():
            assert len(common_step(weight.scale)) == len(weight.scale)
    assert actual.error <= actual.nearest_error
    assert actual.error < 1.15 * search_site(plain, options).error


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(SpecError, match="group=48 does not divide in_features=64"):
        search_site(make_problem(group=48), PLAIN)


ALL_OPTIONS = {
    f"{kind}, {'feedback' if feedback else 'plain'}": SiteOptions(
        transforms=TransformOptions(kinds=KINDS if kind == "auto" else (kind,)), feedback=feedback
    )
    for kind in ("auto", *KINDS)
    for feedback in (None, FeedbackOptions())
}


def drifted(problem: SiteProblem) -> SiteProblem:
    """The same site behind a prefix that has lost something already."""
    noise = 0.1 * normal(*problem.inputs.shape, seed=9)
    return replace(problem, inputs=problem.inputs + noise, references=problem.inputs)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 16, 32]),
    activation_bits=st.sampled_from([None, 4, 6, 8]),
    symmetric=st.booleans(),
    drift=st.booleans(),
    options=st.sampled_from(sorted(ALL_OPTIONS)),
)
def test_no_option_makes_a_site_worse_than_nearest(seed, bits, group, activation_bits, symmetric, drift, options):
    """The invariant holds for every transform, with and without feedback, against either target."""
    problem = make_problem(seed=seed, bits=bits, group=group, activation_bits=activation_bits, symmetric=symmetric)
    problem = drifted(problem) if drift else problem

    choice = search_site(problem, ALL_OPTIONS[options])

    assert choice.error <= choice.nearest_error
    assert choice.error == pytest.approx(output_error(problem, choice), rel=ROUNDING_NOISE)


@pytest.mark.parametrize("options", ALL_OPTIONS.values(), ids=ALL_OPTIONS)
def test_the_search_returns_what_rounding_gives(options):
    """A caller that rounds the same site again with what was chosen gets the same weights."""
    problem = make_problem(activation_bits=4)
    actual = search_site(problem, options)

    again = round_site(problem, options, activation_clip=actual.activation_clip, transform=actual.transform)

    assert again.error == actual.error
    assert again.weight_clips == actual.weight_clips
    for name, quantized in actual.weights.items():
        assert torch.equal(again.weights[name].codes, quantized.codes)
        assert torch.equal(again.weights[name].scale, quantized.scale)


@pytest.mark.parametrize("bits, activation_bits", [(4, None), (4, 8), (4, 4), (3, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_feedback_beats_plain_rounding_on_other_tokens(bits, activation_bits, seed):
    """Measured on tokens of the same kind that neither has seen, where channels depend on each other."""
    mixing = normal(64, 64, seed=50) / 4
    weights = {"q": normal(24, 64, seed=seed + 1), "k": normal(8, 64, seed=seed + 2)}
    seen, unseen = normal(2000, 64, seed=seed) @ mixing, normal(500, 64, seed=seed + 90) @ mixing
    problem = make_problem(bits=bits, activation_bits=activation_bits, weights=weights, inputs=seen)

    plain, fed = (
        search_site(problem, SiteOptions(transforms=None, feedback=feedback)) for feedback in (None, FeedbackOptions())
    )

    held_out = replace(problem, inputs=unseen)
    assert output_error(held_out, fed) < 0.9 * output_error(held_out, plain)


def test_feedback_uses_tokens_beyond_the_sample():
    """Candidates are compared on few tokens, second moments need all."""
    tokens = normal(3000, 64) @ normal(64, 64, seed=50)
    sample = make_problem(inputs=tokens[:40], activation_bits=8)

    alone = search_site(sample, SiteOptions(transforms=None))
    with_all = search_site(replace(sample, all_inputs=[tokens]), SiteOptions(transforms=None))

    held_out = replace(sample, inputs=normal(500, 64, seed=90) @ normal(64, 64, seed=50))
    assert output_error(held_out, with_all) < output_error(held_out, alone)


def test_the_target_is_what_full_precision_gives():
    """A prefix that halves every activation is made good by weights twice as large."""
    tokens = normal(500, 64)
    problem = make_problem(bits=8, group=None, activation_bits=8, inputs=tokens / 2)

    choice = search_site(replace(problem, references=tokens), SiteOptions())

    assert choice.error < 1e-3 < choice.nearest_error


def test_linears_with_different_grids_share_the_transform():
    """They read one tensor; only their weights are rounded on grids of their own."""
    problem = make_problem(activation_bits=8)
    specs = {"q": WeightSpec(bits=4, group=32), "k": WeightSpec(bits=8)}

    choice = search_site(replace(problem, specs=specs), SiteOptions(transforms=TransformOptions(kinds=("both",))))

    assert choice.transform.rotation == 32
    assert choice.weights["q"].scale.shape == (24, 2) and choice.weights["k"].scale.shape == (8, 1)
    assert list(choice.weights) == ["q", "k"]


def test_small_gains_of_clips_are_taken_only_where_they_are_made_good():
    """Clipping shrinks every output a little; the corrected target takes that back."""
    problem = make_problem(activation_bits=4, group=32, inputs=normal(2000, 64))

    alone, fed = (
        search_site(problem, SiteOptions(transforms=None, feedback=feedback)) for feedback in (None, FeedbackOptions())
    )

    assert alone.activation_clip == 1.0
    assert 0.8 <= fed.activation_clip < 1.0
