"""Scales that are multiples of one step per row: exact in their dtype, and close to what was wanted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_qvlm.kernels.levels import LARGEST_MULTIPLE, common_step
from optimum_qvlm.quant.affine import dequantize_weight, quantize_weight
from optimum_qvlm.quant.levels import fit_steps, to_multiples
from optimum_qvlm.spec import WeightSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def wanted(rows: int, groups: int, *, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Scales of either sign; `spread` is that of their logarithms."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.randn(rows, groups, generator=generator) * spread).exp() / 100
    return size * (torch.randint(2, size.shape, generator=generator) * 2 - 1)


@given(
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 40),
    groups=st.integers(1, 40),
    spread=st.sampled_from([0.0, 0.2, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_multiples_are_exact_whatever_is_wanted(dtype, exponent, groups, spread, seed):
    """Rounded once more where they are stored, they would be multiples of nothing."""
    scale = wanted(7, groups, spread=spread, seed=seed) * 2.0**exponent

    step = fit_steps(scale, dtype)
    actual = to_multiples(scale, step, dtype)

    multiples = actual.double() / step.double()
    assert actual.dtype == dtype and step.shape == (7, 1)
    assert torch.equal(multiples, multiples.round())
    assert bool(((multiples.abs() >= 1) & (multiples.abs() <= LARGEST_MULTIPLE)).all())
    assert torch.equal(actual < 0, scale < 0)
    assert bool((common_step(actual).double() >= step.squeeze(1).double()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_are_multiples_are_kept(dtype):
    """What was rounded once is not moved again."""
    step = torch.tensor([[11 / 16], [1.0], [9 / 8]]) / 256
    scale = (step * torch.tensor([[15, -8, 13], [11, 14, 9], [-12, 15, 8]])).to(dtype)

    actual = to_multiples(scale, fit_steps(scale, dtype), dtype)

    assert torch.equal(actual, scale)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0.04), (torch.float16, 0.04), (torch.bfloat16, 0.06)])
def test_scales_of_one_size_are_hit_within_some_percent(dtype, bound):
    """Half a step of eight to fifteen, and less where the step fits."""
    scale = wanted(200, 16, spread=0.15)

    actual = to_multiples(scale, fit_steps(scale, dtype), dtype).float()

    assert float((actual / scale - 1).abs().mean()) < bound


def test_what_matters_is_fitted_best():
    """The groups that count have the smaller errors."""
    scale = wanted(500, 8, spread=0.5)
    importance = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])

    def error(step: torch.Tensor) -> torch.Tensor:
        return (to_multiples(scale, step, torch.float32) - scale).square()

    even, weighted = error(fit_steps(scale, torch.float32)), error(fit_steps(scale, torch.float32, importance))

    assert float(weighted[:, 0].sum()) < 0.5 * float(even[:, 0].sum())
    assert float((weighted * importance).sum()) <= float((even * importance).sum())


def test_zeros_take_the_step_of_their_row_or_one():
    """No scale is zero, which kernels and formats would divide by."""
    scale = torch.tensor([[0.0, 0.0], [0.0, 0.75]])

    actual = to_multiples(scale, fit_steps(scale, torch.bfloat16), torch.bfloat16)

    assert actual[0].tolist() == [1.0, 1.0]
    assert 0 < float(actual[1, 0]) <= 0.1
    assert abs(float(actual[1, 1]) - 0.75) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits, bound", [(4, 1.03), (3, 1.03), (2, 1.03)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_weight_loses_little(signed, bits, bound, dtype):
    """Groups of a row are alike, so that multiples between 8 and 15 suffice."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) / 50
    free, bound_to = (WeightSpec(bits=bits, group=64, two_level=levels) for levels in (False, True))

    def error(spec: WeightSpec) -> float:
        rounded = quantize_weight(weight, spec, scale_dtype=dtype, signed=signed)
        return float((dequantize_weight(rounded) - weight).square().sum())

    assert error(bound_to) < bound * error(free)


@given(
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 4),
    group=st.sampled_from([16, 32]),
    clip=st.sampled_from([1.0, 0.8]),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rounded_weights_have_codes_for_the_scales_that_are_stored(dtype, bits, group, clip, signed, seed):
    """The grid is the usual one: code times scale, the nearest, clamped."""
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0

    rounded = quantize_weight(
        weight, WeightSpec(bits=bits, group=group, two_level=True), clip=clip, scale_dtype=dtype, signed=signed
    )

    steps = weight / rounded.scale.float().repeat_interleave(group, dim=1)
    expected = torch.round(steps).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(rounded.codes.float(), expected)
    common_step(rounded.scale)
