"""Error feedback: against a slow definition in double precision, and for what it promises at the site's output."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from optimum_qvlm.kernels.levels import LARGEST_MULTIPLE, common_step
from optimum_qvlm.quant.affine import dequantize_weight, quantize_weight
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search import error_feedback as feedback
from optimum_qvlm.search.error_feedback import (
    FeedbackOptions,
    Moments,
    conditional_moments,
    corrected_target,
    round_with_feedback,
    site_moments,
)
from optimum_qvlm.search.site_problem import SiteProblem
from optimum_qvlm.spec import ActivationSpec, WeightSpec

SOLVER_NOISE = 1e-3
"""Relative; factors of a Hessian with 1 % damping, in fp32 against fp64."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Tokens whose channels depend on each other, of unequal size, as behind a real norm."""
    mixing = normal(channels, channels, seed=seed + 100) / channels**0.5 + torch.eye(channels)
    return normal(tokens, channels, seed=seed) @ mixing * torch.linspace(0.3, 3, channels)


def rounded(target: Tensor, hessian: Tensor, spec: WeightSpec, **changes):
    """Defaults of one clip and the natural order."""
    values = {
        "scale_dtype": torch.float32,
        "clips": (1.0,),
        "options": FeedbackOptions(ordered=False),
    }
    return round_with_feedback(target, hessian, spec, **(values | changes))


def slow_codes(target: Tensor, hessian: Tensor, spec: WeightSpec, damping: float) -> Tensor:
    """Channel after channel: round, then let all later channels minimise the damped error, solved anew each time."""
    work = target.double().clone()
    channels = work.shape[1]
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(channels)
    width = spec.group or channels
    codes = torch.empty(work.shape, dtype=torch.int8)
    low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    for channel in range(channels):
        if channel % width == 0:
            part = work[:, channel : channel + width].float()
            grid = quantize_weight(part, WeightSpec(bits=spec.bits, symmetric=spec.symmetric), signed=True)
        zero = 0 if grid.zero_point is None else grid.zero_point[:, 0].double()
        step = grid.scale[:, 0].double()
        code = (torch.round(work[:, channel] / step) + zero).clamp(low, high)
        codes[:, channel] = code.to(torch.int8)
        error = (code - zero) * step - work[:, channel]
        later = slice(channel + 1, channels)
        if channel + 1 < channels:
            answer = torch.linalg.solve(damped[later, later], damped[later, channel])
            work[:, later] -= error.unsqueeze(1) * answer
    return codes


@pytest.mark.parametrize("group", [None, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_codes_are_those_of_the_slow_definition(group, symmetric, bits):
    """The triangular recursion is only a fast way to solve for what the later channels should do."""
    inputs, target = correlated(200, 32), normal(6, 32, seed=1)
    hessian = inputs.T @ inputs
    spec = WeightSpec(bits=bits, group=group, symmetric=symmetric)

    actual, _ = rounded(target, hessian, spec)

    assert torch.equal(actual.codes, slow_codes(target, hessian, spec, FeedbackOptions().damping))


def test_independent_channels_are_rounded_to_nearest():
    """Where no channel can make good what another did, there is nothing to feed back."""
    target, spec = normal(5, 64), WeightSpec(bits=4, group=16)

    actual, ratio = rounded(target, torch.eye(64), spec)

    expected = quantize_weight(target, spec, signed=True)
    assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.scale, expected.scale)
    assert torch.equal(ratio, torch.ones(5, 4))


@pytest.mark.parametrize("group", [None, 16, 64, 256], ids=["row", "16", "64", "beyond a block"])
@pytest.mark.parametrize("bits, symmetric", [(3, True), (4, False), (8, True)])
@pytest.mark.parametrize("ordered", [True, False])
def test_the_output_error_falls(group, bits, symmetric, ordered):
    """That is what error feedback is for. Compared with plain rounding that searches the same clips."""
    inputs, target = correlated(2000, 256), normal(24, 256, seed=1)
    hessian, spec, clips = inputs.T @ inputs, WeightSpec(bits=bits, group=group, symmetric=symmetric), (1.0, 0.9, 0.8)

    actual, _ = rounded(target, hessian, spec, clips=clips, options=FeedbackOptions(ordered=ordered))

    width = group or 256
    blocks = torch.stack([hessian[s : s + width, s : s + width] for s in range(0, 256, width)])
    ratio = feedback.clip_by_moment(target, spec, blocks, torch.float32, clips)
    plain = quantize_weight(target, spec, clip=ratio)
    errors = [float((inputs @ (dequantize_weight(q) - target).T).square().sum()) for q in (actual, plain)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("group", [None, 16, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_reordering_gives_scales_back_in_their_places(group, symmetric):
    """Channels are visited by size; what is stored is in the weight's own order."""
    target = normal(7, 256, seed=1) * torch.logspace(-2, 0, 256)
    inputs = correlated(500, 256).flip(1)

    spec = WeightSpec(bits=8, group=group, symmetric=symmetric)
    actual, _ = rounded(target, inputs.T @ inputs, spec, options=FeedbackOptions(ordered=True))

    assert actual.scale.shape == (7, spec.groups(256))
    close = quantize_weight(target, spec)
    assert torch.allclose(actual.scale, close.scale, rtol=0.2)
    assert bool(((dequantize_weight(actual) - target).norm(dim=1) < 0.1 * target.norm(dim=1)).all())


@pytest.mark.parametrize("group", [None, 16])
def test_slices_of_rows_do_not_change_the_answer(group, monkeypatch):
    """They only bound memory. A row that is one group is the same to the bit.

    What small groups pass on to those behind them is a matrix product, which BLAS adds up in another order for another
    number of rows: a scale that is chosen behind it may differ by a unit in the last place, and no code does.
    """
    inputs, target = correlated(100, 64), normal(10, 64, seed=1)
    spec = WeightSpec(bits=4, group=group)
    whole, _ = rounded(target, inputs.T @ inputs, spec, clips=(1.0, 0.8))

    monkeypatch.setattr(feedback, "ROWS_AT_ONCE", 3)
    sliced, _ = rounded(target, inputs.T @ inputs, spec, clips=(1.0, 0.8))

    assert torch.equal(sliced.codes, whole.codes)
    last_place = 0.0 if group is None else torch.finfo(torch.float32).eps
    torch.testing.assert_close(sliced.scale, whole.scale, rtol=last_place, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_fit_scales_as_they_are_stored(dtype):
    """Scales are rounded before the codes are chosen, so nothing moves in a checkpoint."""
    inputs, target = correlated(300, 64), normal(8, 64, seed=1)

    actual, _ = rounded(target, inputs.T @ inputs, WeightSpec(bits=8, group=16), scale_dtype=dtype)

    assert actual.scale.dtype == dtype
    assert torch.allclose(dequantize_weight(actual), target, atol=0.1)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("case", ["no tokens of any size", "dead channels", "one token", "equal channels"])
def test_a_hessian_without_an_inverse_is_enough(group, case):
    """Calibration data may hold channels that are always zero, and fewer tokens than channels."""
    inputs = correlated(300, 64)
    if case == "no tokens of any size":
        inputs = inputs * 0
    elif case == "dead channels":
        inputs[:, 5:20] = 0
    elif case == "one token":
        inputs = inputs[:1]
    else:
        inputs = inputs[:, :1].expand(-1, 64)

    actual, _ = rounded(normal(4, 64), inputs.T @ inputs, WeightSpec(bits=4, group=group), clips=(1.0, 0.9))

    assert bool(torch.isfinite(dequantize_weight(actual)).all())
    assert float((dequantize_weight(actual) - normal(4, 64)).abs().amax()) < 3


def test_clips_come_from_the_grid():
    inputs, target = correlated(300, 64), normal(8, 64, seed=1) ** 3

    actual, ratio = rounded(target, inputs.T @ inputs, WeightSpec(bits=3, group=16), clips=(1.0, 0.8))

    assert set(ratio.unique().tolist()) <= {1.0, torch.tensor(0.8).item()}
    assert float(ratio.mean()) < 1.0
    assert actual.codes.dtype == torch.int8


@pytest.mark.parametrize("bits", [3, 4])
def test_signs_of_scales_lower_the_error(bits):
    """A grid whose extra step lies on the wrong side of zero wastes it. Both try the same clips."""
    inputs, target = correlated(2000, 256), normal(64, 256, seed=1)
    hessian, spec = inputs.T @ inputs, WeightSpec(bits=bits, group=32)

    errors = []
    for signed in (True, False):
        actual, _ = rounded(target, hessian, spec, clips=(1.0, 0.9, 0.8), options=FeedbackOptions(signed=signed))
        assert bool((actual.scale < 0).any()) == signed
        errors.append(float((inputs @ (dequantize_weight(actual) - target).T).square().sum()))

    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("group", [32, 64, 192], ids=["a group at a time", "two", "beyond a block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_scales_on_two_levels_stay_there_and_cost_little(sweeps, dtype, group):
    """Whoever moves a scale, error feedback or refinement, moves it to another multiple of its row's step."""
    inputs, target = correlated(2000, 384), normal(60, 384, seed=1)
    hessian = inputs.T @ inputs
    options = FeedbackOptions(sweeps=sweeps)
    values = {"scale_dtype": dtype, "clips": (1.0, 0.9, 0.8), "options": options}

    free, _ = rounded(target, hessian, WeightSpec(bits=4, group=group), **values)
    actual, ratio = rounded(target, hessian, WeightSpec(bits=4, group=group, two_level=True), **values)

    step = common_step(actual.scale).double().unsqueeze(1)
    multiples = (actual.scale.double() / step).abs()
    assert torch.equal(multiples, multiples.round()) and float(multiples.max()) <= LARGEST_MULTIPLE
    assert actual.scale.dtype == dtype and bool((actual.scale < 0).any()) and ratio.shape == actual.scale.shape

    def error(weight) -> float:
        change = (dequantize_weight(weight) - target).double()
        return float(((change @ hessian.double()) * change).sum())

    assert error(actual) < 1.08 * error(free)


def test_the_step_of_a_row_does_not_depend_on_the_others(monkeypatch):
    """Rows are rounded in slices."""
    inputs, target = correlated(500, 128), normal(9, 128, seed=2)
    spec = WeightSpec(bits=4, group=32, two_level=True)
    whole, _ = rounded(target, inputs.T @ inputs, spec)
    monkeypatch.setattr(feedback, "ROWS_AT_ONCE", 4)

    sliced, _ = rounded(target, inputs.T @ inputs, spec)

    assert torch.equal(sliced.scale, whole.scale) and torch.equal(sliced.codes, whole.codes)


def test_eight_bits_keep_positive_scales():
    """There a step more is nothing, and other software writes them so."""
    inputs, target = correlated(300, 64), normal(8, 64, seed=1)

    actual, _ = rounded(target, inputs.T @ inputs, WeightSpec(bits=8))

    assert bool((actual.scale > 0).all())


def test_a_unit_error_costs_what_is_left_after_the_later_channels_answered():
    """The Schur complement, computed here the slow way."""
    inputs = correlated(400, 16).double()
    hessian = inputs.T @ inputs
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)

    actual = conditional_moments(hessian.float(), 0.01)

    for channel in range(16):
        later = slice(channel + 1, 16)
        answered = damped[channel, later] @ torch.linalg.solve(damped[later, later], damped[later, channel])
        expected = damped[channel, channel] - (answered if channel < 15 else 0)
        assert float(actual[channel]) == pytest.approx(float(expected), rel=SOLVER_NOISE)


TRANSFORMS = [SiteTransform(), SiteTransform(torch.linspace(0.5, 2, 64), 16)]


def make_problem(*, activation_bits: int | None, drift: float = 0.0) -> SiteProblem:
    """Eight rows that read 500 tokens, in two pieces; the quantized prefix has added `drift`."""
    expected = correlated(500, 64)
    actual = expected + drift * correlated(500, 64, seed=7)
    return SiteProblem(
        inputs=actual[:100],
        references=expected[:100],
        all_inputs=[actual[:300], actual[300:]],
        all_references=[expected[:300], expected[300:]],
        weights={"q": normal(8, 64, seed=3)},
        specs={"q": WeightSpec(bits=4, group=16)},
        activation=None if activation_bits is None else ActivationSpec(bits=activation_bits, group=16),
        scale_dtype=torch.float32,
    )


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "both"])
def test_moments_are_sums_over_all_tokens(transform):
    problem = make_problem(activation_bits=4, drift=0.1)

    halves = site_moments(problem, problem.rounding(0.9, transform), 1.0)

    actual = problem.rounding(0.9, transform)(torch.cat(list(problem.all_inputs)))
    expected = torch.cat(list(problem.all_references))
    assert torch.allclose(halves[0].hessian + halves[1].hessian, actual.T @ actual, rtol=1e-3, atol=1e-1)
    assert torch.allclose(halves[0].cross + halves[1].cross, expected.T @ actual, rtol=1e-3, atol=1e-1)
    first = torch.cat([actual[:150], actual[300:400]])
    assert torch.allclose(halves[0].hessian, first.T @ first, rtol=1e-3, atol=1e-1)


def test_a_token_counts_as_often_as_its_weight_says():
    """A weight of two is the token met twice."""
    problem = make_problem(activation_bits=4, drift=0.1)
    weights = [
        torch.randint(0, 3, (len(piece), 1), generator=torch.Generator().manual_seed(5)).float()
        for piece in problem.all_inputs
    ]
    repeats = [weight.flatten().long() for weight in weights]
    repeated = replace(
        problem,
        all_inputs=[piece.repeat_interleave(n, 0) for piece, n in zip(problem.all_inputs, repeats, strict=True)],
        all_references=[
            piece.repeat_interleave(n, 0) for piece, n in zip(problem.all_references, repeats, strict=True)
        ],
    )
    weighed = replace(problem, token_weights=weights)

    first, second = (site_moments(p, p.rounding(1.0, SiteTransform()), 1.0) for p in (weighed, repeated))

    for name in ("hessian", "cross"):
        sums = [getattr(halves[0], name) + getattr(halves[1], name) for halves in (first, second)]
        assert torch.allclose(*sums, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "both"])
def test_the_target_is_the_folded_weight_where_nothing_differs(transform):
    problem = make_problem(activation_bits=None)

    target = corrected_target(
        problem.weights["q"], site_moments(problem, problem.rounding(1.0, transform), 1.0), transform, 0.01
    )

    assert torch.allclose(target, transform.fold(problem.weights["q"]), atol=1e-3)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "both"])
@pytest.mark.parametrize("activation_bits, drift", [(4, 0.0), (None, 0.2), (4, 0.2)])
def test_the_target_makes_good_what_the_inputs_lost(transform, activation_bits, drift):
    """As good a weight as there is for full-precision outputs on these tokens, but for what may be noise."""
    problem = make_problem(activation_bits=activation_bits, drift=drift)
    halves, weight = site_moments(problem, problem.rounding(1.0, transform), 1.0), problem.weights["q"]

    target = corrected_target(weight, halves, transform, 1e-4)

    inputs = problem.rounding(1.0, transform)(torch.cat(list(problem.all_inputs)))
    expected = torch.cat(list(problem.all_references)) @ weight.T
    best = torch.linalg.lstsq(inputs, expected).solution.T

    def error(candidate: Tensor) -> float:
        return float((inputs @ candidate.T - expected).square().sum())

    assert error(target) < error(transform.fold(weight))
    assert error(target) <= 1.2 * error(best)


def test_without_asymmetry_the_prefix_keeps_its_error():
    """Only what rounding this site's inputs did is made good then, and here they are not rounded."""
    problem = make_problem(activation_bits=None, drift=0.5)

    halves = site_moments(problem, problem.rounding(1.0, SiteTransform()), 0.0)

    target = corrected_target(problem.weights["q"], halves, SiteTransform(), 0.01)
    assert torch.allclose(target, problem.weights["q"], atol=1e-3)


def test_moments_of_zeros_leave_the_weight():
    nothing = Moments(torch.zeros(64, 64), torch.zeros(64, 64))

    assert torch.equal(corrected_target(normal(3, 64), (nothing, nothing), SiteTransform(), 0.01), normal(3, 64))


def test_noise_is_not_learned_by_heart():
    """Outputs that the inputs do not explain must not move the weight, however few the tokens."""
    inputs, weight = correlated(160, 64), normal(8, 64, seed=3)
    problem = SiteProblem(
        inputs=inputs,
        references=inputs + normal(160, 64, seed=5),
        weights={"q": weight},
        specs={"q": WeightSpec(bits=4, group=16)},
        activation=None,
        scale_dtype=torch.float32,
    )

    target = corrected_target(
        weight, site_moments(problem, problem.rounding(1.0, SiteTransform()), 1.0), SiteTransform(), 0.01
    )

    unseen = correlated(1000, 64, seed=8) / correlated(1000, 64, seed=8).std(0)
    assert float((unseen @ (target - weight).T).square().mean()) < 0.05 * float((unseen @ weight.T).square().mean())
