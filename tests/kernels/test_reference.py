"""The torch definitions: what every faster backend has to give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import Rounding, dequantize_tokens, fake_quantize_tokens, quantize_tokens, quantized_linear
from optimum_qvlm.kernels.reference import FITTED_RATIOS

BITS = range(2, 9)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 32), (7, 129), (64, 1024), (2, 5, 96), (0, 64)]

HALF_STEP = 0.5 * (1 + 1e-5)
"""Half a step; the margin covers the rounding of the quotient x / scale and of codes * scale in fp32."""


def activations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, of which the first token is zero where there is more than one."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.dim() > 1 and x.shape[0] > 1:
        x[0] = 0
    return x.to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_are_the_rounded_quotients(bits, shape, dtype):
    """Codes and scales follow from the equation in fp32, whatever dtype comes in."""
    x = activations(*shape, dtype=dtype)
    qmax = 2 ** (bits - 1) - 1

    codes, scale = quantize_tokens(x, bits, None, 1.0)

    peak = x.float().abs().amax(dim=-1, keepdim=True)
    expected = torch.where(peak > 0, peak / qmax, torch.ones_like(peak))
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (*shape[:-1], 1)
    assert torch.equal(scale, expected)
    assert torch.equal(codes, torch.round(x.float() / expected).to(torch.int8))


@pytest.mark.parametrize("bits", BITS)
def test_halves_round_to_even(bits):
    """Another rule for halves would give other codes on another backend."""
    qmax = 2 ** (bits - 1) - 1
    halves = [k + 0.5 for k in range(-qmax, qmax)]
    x = torch.tensor([[*halves, float(qmax)]])

    codes, scale = quantize_tokens(x, bits, None, 1.0)

    assert scale.item() == 1.0
    assert codes[0, :-1].tolist() == [round(half) for half in halves]


@pytest.mark.parametrize("group", [None, 16, 1])
def test_zeros_get_scale_one_and_code_zero(group):
    """A padded token must not divide by zero."""
    codes, scale = quantize_tokens(torch.zeros(3, 32), 4, group, 0.7)

    assert torch.equal(codes, torch.zeros(3, 32, dtype=torch.int8))
    assert torch.equal(scale, torch.ones_like(scale))


@pytest.mark.parametrize("group", [1, 3, 32, 96])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_group_is_rounded_as_if_it_were_a_token(group, bits):
    """Groups are independent of each other."""
    x = activations(5, 96)

    codes, scale = quantize_tokens(x, bits, group, 0.9)

    for number, part in enumerate(x.split(group, dim=-1)):
        expected_codes, expected_scale = quantize_tokens(part, bits, None, 0.9)
        assert torch.equal(codes[:, number * group : (number + 1) * group], expected_codes)
        assert torch.equal(scale[:, number : number + 1], expected_scale)


@pytest.mark.parametrize("channels, group", [(96, 64), (1, 2), (129, 128)])
def test_a_group_that_does_not_divide_is_refused(channels, group):
    with pytest.raises(SpecError, match=f"group={group} does not divide the {channels} channels of the activation"):
        quantize_tokens(torch.zeros(2, channels), 4, group, 1.0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", [1.0, 0.75, 0.5])
def test_clip_saturates_what_lies_outside(bits, clip):
    """The largest code stands for `clip` times the peak, and nothing goes past it."""
    x = activations(6, 64)[1:]
    qmax = 2 ** (bits - 1) - 1

    codes, scale = quantize_tokens(x, bits, None, clip)

    limit = x.abs().amax(dim=-1, keepdim=True) * clip
    torch.testing.assert_close(scale * qmax, limit)
    outside = x.abs() > limit
    assert bool(outside.any()) == (clip < 1.0)
    assert bool((codes.abs()[outside] == qmax).all())
    assert int(codes.abs().max()) == qmax


@given(
    bits=st.integers(2, 8),
    clip=st.sampled_from([1.0, 0.8, 0.5]),
    shape=st.sampled_from([(1, 1), (3, 8), (2, 3, 24)]),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**16),
)
def test_error_inside_the_clip_is_at_most_half_a_step(bits, clip, shape, exponent, seed):
    """The defining property of rounding to nearest, at any magnitude."""
    x = activations(*shape, seed=seed) * 2.0**exponent

    codes, scale = quantize_tokens(x, bits, 8 if shape[-1] % 8 == 0 else None, clip)

    step = scale.repeat_interleave(x.shape[-1] // scale.shape[-1], dim=-1)
    inside = x.abs() <= step * (2 ** (bits - 1) - 1)
    error = (dequantize_tokens(codes, scale) - x).abs()
    assert bool((error[inside] <= HALF_STEP * step[inside]).all())


@given(bits=st.integers(2, 8), exponent=st.integers(-30, 30), seed=st.integers(0, 2**16))
def test_powers_of_two_change_scales_and_not_codes(bits, exponent, seed):
    """Codes do not depend on the unit of the activations."""
    x = activations(4, 32, seed=seed)

    codes, scale = quantize_tokens(x, bits, 16, 0.9)
    scaled_codes, scaled_scale = quantize_tokens(x * 2.0**exponent, bits, 16, 0.9)

    assert torch.equal(scaled_codes, codes)
    assert torch.equal(scaled_scale[1:], scale[1:] * 2.0**exponent)


@pytest.mark.parametrize("sign", [-1, 1])
def test_signs_are_treated_alike(sign):
    """The grid is symmetric, so the code -2^(bits-1) is never used."""
    x = activations(8, 64)

    codes, _ = quantize_tokens(sign * x, 4, None, 0.5)

    assert torch.equal(codes, sign * quantize_tokens(x, 4, None, 0.5)[0])
    assert int(codes.min()) == -7


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (64, 1024), (2, 5, 96), (0, 64)], ids=str)
def test_a_fitted_grid_uses_its_lowest_code_for_the_largest_value(bits, shape):
    """Its sign is on the side with one code more, so the peak is held at full range with a smaller step."""
    x = activations(*shape)

    _, scale = quantize_tokens(x, bits, None, 1.0, fitted=True)

    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    held = peak != 0
    assert bool(((peak / scale)[held] < 0).all())
    assert bool((scale[~held] == 1).all())


@pytest.mark.parametrize("bits, share", [(2, 0.8), (3, 0.85), (4, 0.9), (5, 0.95), (6, 1.0), (8, 1.0)])
@pytest.mark.parametrize("group", [None, 32])
def test_a_fitted_grid_has_less_error_than_a_symmetric_one(bits, share, group):
    """The fewer the codes, the more is gained."""
    x = activations(256, 128)[1:]

    errors = [
        (dequantize_tokens(*quantize_tokens(x, bits, group, 1.0, fitted=fitted)) - x).square().sum(-1)
        for fitted in (True, False)
    ]

    assert float(errors[0].sum()) < share * float(errors[1].sum())


def test_a_fitted_scale_is_the_best_of_its_candidates():
    """By the error in codes, of which 64ths are counted."""
    x = activations(64, 96)[1:]
    codes, scale = quantize_tokens(x, 4, None, 1.0, fitted=True)
    error = (codes * scale - x).square().sum(-1)
    top, bottom = x.amax(-1), -x.amin(-1)
    whole = torch.maximum(torch.maximum(top, bottom) / 8, torch.minimum(top, bottom) / 7)
    whole = torch.where(top > bottom, -whole, whole)

    for ratio in FITTED_RATIOS:
        candidate = (whole * ratio).unsqueeze(-1)
        other = ((x / candidate).round().clamp(-8, 7) * candidate - x).square().sum(-1)
        assert bool((error <= other * 1.02).all())
    assert len({round(float(r), 2) for r in (scale.squeeze(-1) / whole)}) == len(FITTED_RATIOS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_fitted_scale_does_not_depend_on_the_order_of_channels(dtype):
    """Every backend adds errors up in an order of its own."""
    x = activations(32, 512, dtype=dtype)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(1))

    codes, scale = quantize_tokens(x, 4, None, 0.9, fitted=True)
    moved = quantize_tokens(x[:, order], 4, None, 0.9, fitted=True)

    assert torch.equal(moved[0], codes[:, order])
    assert torch.equal(moved[1], scale)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30, 1e38])
def test_extreme_magnitudes_stay_finite(magnitude):
    x = activations(3, 64).clamp(-3, 3) * magnitude

    restored = dequantize_tokens(*quantize_tokens(x, 8, None, 1.0))

    assert bool(torch.isfinite(restored).all())
    assert float((restored - x).abs().max()) <= magnitude * 3 / 127


def test_non_contiguous_activations_are_rounded_alike():
    """A slice or a transpose comes out of attention layers."""
    x = activations(64, 9).T

    codes, scale = quantize_tokens(x, 4, 32, 1.0)

    expected_codes, expected_scale = quantize_tokens(x.contiguous(), 4, 32, 1.0)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (0, 32)], ids=str)
def test_dequantize_multiplies_each_group_with_its_scale(group, shape):
    codes, scale = quantize_tokens(activations(*shape), 6, group, 1.0)

    restored = dequantize_tokens(codes, scale)

    assert restored.dtype == torch.float32 and restored.shape == codes.shape
    assert torch.equal(restored, codes.float() * scale.repeat_interleave(group or 32, dim=-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_fake_quantize_rounds_and_keeps_the_dtype(dtype, needs_gradient, clip):
    """Training and inference must see the same values."""
    x = activations(16, 96, dtype=dtype).requires_grad_(needs_gradient)

    rounded = fake_quantize_tokens(x, 4, 32, clip)

    expected = dequantize_tokens(*quantize_tokens(x.detach(), 4, 32, clip)).to(dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, expected)


@pytest.mark.parametrize("operation", [quantize_tokens, fake_quantize_tokens])
@pytest.mark.parametrize("group", [None, 32])
def test_the_activations_themselves_are_left_alone(operation, group):
    """Residual connections read them afterwards."""
    x = activations(4, 64)
    before = x.clone()

    operation(x, 4, group, 0.5)

    assert torch.equal(x, before)


@pytest.mark.parametrize("bits, group, clip", [(2, None, 1.0), (4, 32, 0.5), (8, None, 0.8)])
def test_gradients_pass_straight_through(bits, group, clip):
    """Also where the clip saturates: the tower's parameters are learned through this."""
    x = activations(4, 64).requires_grad_()
    upstream = activations(4, 64, seed=1)

    fake_quantize_tokens(x, bits, group, clip).backward(upstream)

    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (0, 32)], ids=str)
def test_quantized_linear_rounds_once_to_the_input_dtype(dtype, bias, shape):
    """Products and sums are fp32, over activations that were rounded to their grid in fp32."""
    x = activations(*shape, dtype=dtype)
    weight = activations(8, 32, seed=1)
    shift = activations(8, seed=2, dtype=dtype) if bias else None

    y = quantized_linear(x, weight, shift, Rounding(bits=4, group=16, clip=0.9))

    assert y.dtype == dtype and y.shape == (*shape[:-1], 8)
    product = F.linear(fake_quantize_tokens(x.float(), 4, 16, 0.9), weight)
    assert torch.equal(y, (product if shift is None else product + shift.float()).to(dtype))
