"""Descent behind error feedback: no step may raise the error, and what is stored is what was judged."""

import pytest
import torch
from torch import Tensor

from optimum_qvlm.kernels.levels import LARGEST_MULTIPLE
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight, quantize_weight
from optimum_qvlm.quant.levels import fit_steps, to_multiples
from optimum_qvlm.search import refinement
from optimum_qvlm.search.error_feedback import FeedbackOptions, round_with_feedback
from optimum_qvlm.search.refinement import refined
from optimum_qvlm.spec import WeightSpec

SUMMATION = 1e-4
"""Relative; the slope is kept up to date in fp32."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(channels: int, tokens: int = 500, seed: int = 0) -> Tensor:
    """Of tokens whose channels depend on each other, damped."""
    mixing = normal(channels, channels, seed=seed + 100) / channels**0.5 + torch.eye(channels)
    inputs = normal(tokens, channels, seed=seed) @ mixing * torch.linspace(0.3, 3, channels)
    hessian = inputs.T @ inputs
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(channels)


def errors(target: Tensor, hessian: Tensor, weight: QuantizedWeight) -> Tensor:
    """Of each row, in fp64."""
    change = (dequantize_weight(weight) - target).double()
    return ((change @ hessian.double()) * change).sum(1)


CASES = {
    "groups": WeightSpec(bits=4, group=16),
    "zero points": WeightSpec(bits=4, group=32, symmetric=False),
    "two bits": WeightSpec(bits=2, group=64),
    "rows": WeightSpec(bits=4),
    "rows, zero points": WeightSpec(bits=3, symmetric=False),
    "beyond a block": WeightSpec(bits=6, group=192),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def spec(request) -> WeightSpec:
    return request.param


def start_of(target: Tensor, spec: WeightSpec, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    return quantize_weight(target, spec, clip=0.9, scale_dtype=dtype, signed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_sweep_raises_the_error_of_any_row(spec, dtype):
    """Each step is the best one for its scale or code with all others as they are."""
    target, hessian = normal(6, 384, seed=1), moment(384)
    actual = start_of(target, spec, dtype)
    before = errors(target, hessian, actual)

    for _ in range(3):
        actual = refined(target, hessian, actual, spec, sweeps=1)
        after = errors(target, hessian, actual)
        assert bool((after <= before * (1 + SUMMATION)).all())
        before = after

    assert actual.scale.dtype == dtype
    assert float(after.sum()) < 0.9 * float(errors(target, hessian, start_of(target, spec, dtype)).sum())


def test_the_form_stays_that_of_the_grid(spec):
    target = normal(6, 384, seed=1)
    start = start_of(target, spec)

    actual = refined(target, moment(384), start, spec, sweeps=2)

    assert actual.codes.dtype == torch.int8 and actual.codes.shape == start.codes.shape
    assert int(actual.codes.min()) >= -(2 ** (spec.bits - 1)) and int(actual.codes.max()) <= 2 ** (spec.bits - 1) - 1
    assert actual.scale.shape == start.scale.shape and torch.equal(actual.scale.sign(), start.scale.sign())
    if spec.symmetric:
        assert actual.zero_point is None
    else:
        assert torch.equal(actual.zero_point, start.zero_point)


def test_at_the_end_no_single_code_can_be_changed_for_the_better(spec):
    """A local minimum, checked by trying both neighbours of every code."""
    target, hessian = normal(2, 384, seed=1), moment(384)

    actual = refined(target, hessian, start_of(target, spec), spec, sweeps=40)

    least = errors(target, hessian, actual)
    low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    for channel in range(0, 384, 7):
        for step in (-1, 1):
            codes = actual.codes.clone()
            codes[:, channel] = (codes[:, channel] + step).clamp(low, high)
            other = errors(target, hessian, QuantizedWeight(codes, actual.scale, actual.zero_point))
            assert bool((other >= least * (1 - SUMMATION)).all())


def test_independent_channels_end_at_least_squares():
    """Without correlation every code is the nearest to its target, and every scale a projection."""
    target, spec = normal(4, 64, seed=1), WeightSpec(bits=4, group=16)

    actual = refined(target, torch.eye(64), start_of(target, spec), spec, sweeps=40)

    grouped, codes = target.reshape(4, 4, 16), actual.codes.reshape(4, 4, 16).float()
    assert torch.equal(codes, (grouped / actual.scale.unsqueeze(-1)).round().clamp(-8, 7))
    expected = (grouped * codes).sum(-1) / codes.square().sum(-1)
    torch.testing.assert_close(actual.scale, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_weight_on_the_grid_is_left_as_it_is(scale):
    """There is nothing to gain, and rows that do not gain must not change at all."""
    codes = torch.randint(-8, 8, (5, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    start = QuantizedWeight(codes, torch.full((5, 4), scale))

    actual = refined(dequantize_weight(start), moment(64), start, WeightSpec(bits=4, group=16), sweeps=3)

    assert torch.equal(actual.codes, codes) and torch.equal(actual.scale, start.scale)


def test_blocks_do_not_change_the_answer(monkeypatch):
    """They only save work: what follows from a code is applied at once or at the end of its block."""
    target, hessian, spec = normal(6, 96, seed=1), moment(96), WeightSpec(bits=4)
    whole = refined(target, hessian, start_of(target, spec), spec, sweeps=2)

    monkeypatch.setattr(refinement, "BLOCK", 20)
    pieces = refined(target, hessian, start_of(target, spec), spec, sweeps=2)

    assert torch.equal(pieces.codes, whole.codes)
    torch.testing.assert_close(pieces.scale, whole.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["zeros", "one token", "huge"])
def test_odd_weights_and_moments_stay_finite(case):
    target, hessian, spec = normal(3, 32), moment(32), WeightSpec(bits=4, group=8)
    if case == "zeros":
        target[1] = 0
        target[2, 8:16] = 0
    elif case == "one token":
        token = normal(1, 32)
        hessian = token.T @ token + 1e-3 * torch.eye(32)
    else:
        target = target * 1e4

    actual = refined(target, hessian, start_of(target, spec, torch.float16), spec, sweeps=3)

    assert bool(torch.isfinite(dequantize_weight(actual)).all())
    if case == "zeros":
        assert not bool(dequantize_weight(actual)[1].any())


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_behind_error_feedback_every_row_gains_or_stays(group, symmetric, dtype):
    """Clips are reported for the scales as they are afterwards."""
    target, hessian, spec = normal(12, 128, seed=1), moment(128), WeightSpec(bits=4, group=group, symmetric=symmetric)

    def rounded(sweeps: int) -> tuple[QuantizedWeight, Tensor]:
        options = FeedbackOptions(sweeps=sweeps, damping=1e-6)
        return round_with_feedback(target, hessian, spec, scale_dtype=dtype, clips=(1.0, 0.8), options=options)

    (plain, clips), (actual, changed) = rounded(0), rounded(3)

    before, after = errors(target, hessian, plain), errors(target, hessian, actual)
    assert bool((after <= before * (1 + SUMMATION)).all())
    assert float(after.sum()) < 0.98 * float(before.sum())
    torch.testing.assert_close(changed, clips * (actual.scale.float() / plain.scale.float()).abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multiples_of_a_step_move_to_other_multiples(dtype):
    """From scales that are all too large by a multiple or more, and no row ends worse than it began."""
    target, hessian, spec = normal(40, 128, seed=3), moment(128), WeightSpec(bits=4, group=32, two_level=True)
    step = fit_steps(quantize_weight(target, spec, scale_dtype=dtype).scale, dtype)
    start = quantize_weight(target, spec, scale_dtype=dtype, step=step)
    wide = QuantizedWeight(start.codes, to_multiples(start.scale.float() * 1.3, step, dtype))

    actual = refined(target, hessian, wide, spec, sweeps=2, step=step)

    multiples = actual.scale.double() / step.double()
    assert torch.equal(multiples, multiples.round())
    assert float(multiples.min()) >= 1 and float(multiples.max()) <= LARGEST_MULTIPLE
    assert not torch.equal(actual.scale, wide.scale)
    assert bool((errors(target, hessian, actual) <= errors(target, hessian, wide)).all())


def test_eight_bits_are_not_refined():
    """Nothing is left to gain there, and whole rows take long."""
    target, hessian = normal(4, 64, seed=1), moment(64)

    plain, actual = (
        round_with_feedback(
            target,
            hessian,
            WeightSpec(bits=8),
            scale_dtype=torch.float32,
            clips=(1.0,),
            options=FeedbackOptions(sweeps=sweeps),
        )[0]
        for sweeps in (0, 3)
    )

    assert torch.equal(actual.codes, plain.codes) and torch.equal(actual.scale, plain.scale)
