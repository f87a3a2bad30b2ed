"""The kernel that transforms and rounds activations, against the definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_qvlm.kernels import Rounding, dequantize_tokens, quantize_static, quantize_tokens, transform_tokens
from optimum_qvlm.kernels.triton import quantize as triton_quantize
from tests.kernels.triton.launched.grid import (
    DEVICE,
    DTYPES,
    DTYPES_TO_LAUNCH,
    INTERPRETED,
    MARKS,
    ROUNDING,
    make_activations,
)

pytestmark = MARKS

SIZES = [(1, 1), (1, 32), (7, 129), (3, 96), (4, 1024), (1, 4608), (0, 64)]
"""One value, one group, ragged, a width that is no power of two, more than one step, no tokens."""

ROTATIONS = [16, 32, 64, 128]

NEAR = 1e-5
"""Relative difference of scales after a rotation, whose sums are in another order."""


def equalizer(channels):
    return (torch.rand(channels, generator=torch.Generator().manual_seed(1)) + 0.5).to(DEVICE)


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("group", [None, 16, 128, 384])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_without_a_rotation_codes_and_scales_are_the_definition(dtype, size, group, equalized):
    """Codes are integers, so off by one is wrong."""
    tokens, channels = size
    group = group if group is None or channels % group == 0 else channels
    x = make_activations(tokens, channels, dtype)
    for bits, clip in ((8, 1.0), (4, 0.7)):
        rounding = Rounding(bits=bits, group=group, clip=clip, equalizer=equalizer(channels) if equalized else None)

        codes, scale = triton_quantize.quantize(x, rounding)

        expected = quantize_tokens(transform_tokens(x, rounding.equalizer, None), bits, group, clip)
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("channels, group", [(128, None), (384, 128), (640, 32), (2176, 16), (768, 384)])
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_with_a_rotation_codes_differ_by_one_at_most(dtype, channels, group, rotation, equalized):
    """Sums may be in another order, so a value beside a boundary may fall on its other side, and few do."""
    x = make_activations(3, channels, dtype)
    rounding = Rounding(bits=8, group=group, equalizer=equalizer(channels) if equalized else None, rotation=rotation)

    codes, scale = triton_quantize.quantize(x, rounding)

    expected = quantize_tokens(transform_tokens(x, rounding.equalizer, rotation), 8, group, 1.0)
    difference = (codes.int() - expected[0].int()).abs()
    torch.testing.assert_close(scale, expected[1], rtol=NEAR, atol=0)
    assert int(difference.max()) <= 1
    assert int(difference.sum()) <= 1 + codes.numel() // 500


@pytest.mark.parametrize("rotation", [2, 8, 256])
def test_a_rotation_that_is_no_matrix_instruction_is_done_before(rotation):
    """Sizes the kernel has no product for are still rotated."""
    x = make_activations(3, 512)

    codes, scale = triton_quantize.quantize(x, Rounding(bits=8, rotation=rotation))

    expected = quantize_tokens(transform_tokens(x, None, rotation), 8, None, 1.0)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("equalized, rotation", [(False, None), (True, None), (False, 64), (True, 128)])
def test_transformed_activations_keep_their_dtype(dtype, equalized, rotation):
    """Weight-only products take them."""
    x = make_activations(3, 2176, dtype)
    factors = equalizer(2176) if equalized else None

    found = triton_quantize.transform(x, Rounding(equalizer=factors, rotation=rotation))

    expected = transform_tokens(x, factors, rotation)
    assert found.dtype == dtype
    tolerance = max(ROUNDING[dtype], NEAR)
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("scale", [1e-3, 0.05, 40.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_static_scale_is_taken_as_it_is(bits, scale):
    """Values beyond its grid saturate."""
    x = make_activations(3, 2500)
    fixed = torch.tensor([scale], device=DEVICE)

    codes, returned = triton_quantize.quantize(x, Rounding(bits=bits, scale=fixed))

    assert torch.equal(codes, quantize_static(x, bits, fixed))
    assert torch.equal(returned, fixed) and returned.data_ptr() != fixed.data_ptr()


def test_halves_round_to_even():
    halves = [k + 0.5 for k in range(-127, 127)]
    x = torch.tensor([[*halves, 127.0]], device=DEVICE)

    codes, _ = triton_quantize.quantize(x, Rounding(bits=8))

    assert codes[0, :-1].tolist() == [round(half) for half in halves]


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 1e38])
def test_extreme_magnitudes_are_the_definition(magnitude):
    """Scales that underflow become 1, as in the definition, and nothing overflows."""
    x = make_activations(3, 64).clamp(-3, 3) * magnitude

    codes, scale = triton_quantize.quantize(x, Rounding(bits=8, group=32))

    expected = quantize_tokens(x, 8, 32, 1.0)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


def test_columns_past_the_channels_are_zeros():
    """Products read whole blocks."""
    x = make_activations(5, 96)

    codes, scale = triton_quantize.quantize_padded(x, Rounding(bits=4, group=32), 128)

    expected = quantize_tokens(x, 4, 32, 1.0)
    assert torch.equal(codes[:, :96], expected[0]) and not codes[:, 96:].any()
    assert torch.equal(scale[:, :3], expected[1]) and bool((scale[:, 3:] == 1).all())


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)], ids=str)
def test_leading_dimensions_are_kept(shape):
    x = make_activations(6, 64).flatten()[: torch.Size(shape).numel()].view(shape)

    codes, scale = triton_quantize.quantize(x, Rounding(bits=4, group=16))

    expected = quantize_tokens(x, 4, 16, 1.0)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


def test_columns_of_a_wider_tensor_are_read_in_place():
    """Slices of a fused projection come with the stride of the whole; transposes are copied."""
    wide = make_activations(5, 256)

    for x in (wide[:, 64:192], wide.T[64:192, :4]):
        codes, scale = triton_quantize.quantize(x, Rounding(bits=8))

        expected = quantize_tokens(x, 8, None, 1.0)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scale, expected[1])


def test_offsets_past_two_to_the_31_are_reached():
    """The last of three tokens lies 2**31 elements behind the first; only the pages that are used exist."""
    stride = 2**30
    storage = torch.empty(2 * stride + 128, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((3, 128), (stride, 1))
    x.copy_(make_activations(3, 128, torch.float16))

    codes, scale = triton_quantize.quantize(x, Rounding(bits=8))

    expected = quantize_tokens(x, 8, None, 1.0)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@settings(max_examples=20 if INTERPRETED else 200)
@given(
    bits=st.integers(2, 8),
    clip=st.sampled_from([1.0, 0.8, 0.51]),
    tokens=st.integers(1, 4),
    groups=st.integers(1, 9),
    group=st.sampled_from([3, 8, 16, 48, 64]),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**16),
)
def test_any_size_and_magnitude_is_the_definition(bits, clip, tokens, groups, group, exponent, seed):
    x = make_activations(tokens, groups * group, seed=seed) * 2.0**exponent

    codes, scale = triton_quantize.quantize(x, Rounding(bits=bits, group=group, clip=clip))

    expected = quantize_tokens(x, bits, group, clip)
    assert torch.equal(dequantize_tokens(codes, scale), dequantize_tokens(*expected))


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("group", [None, 16, 128, 384])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_fitted_grids_are_the_definition(dtype, size, group, equalized):
    """Which scale is best is decided on sums of integers, so it is the same wherever they are added."""
    tokens, channels = size
    group = group if group is None or channels % group == 0 else channels
    x = make_activations(tokens, channels, dtype)
    for bits, clip in ((4, 1.0), (3, 0.7), (6, 0.9)):
        factors = equalizer(channels) if equalized else None
        rounding = Rounding(bits=bits, group=group, clip=clip, equalizer=factors, fitted=True)

        codes, scale = triton_quantize.quantize(x, rounding)

        expected = quantize_tokens(transform_tokens(x, factors, None), bits, group, clip, fitted=True)
        assert torch.equal(scale, expected[1])
        assert torch.equal(codes, expected[0])
