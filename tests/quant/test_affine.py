"""Rounding of weights: scales as they are stored, codes that go with them, bounded errors."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimum_qvlm.errors import SpecError
from optimum_qvlm.quant.affine import QuantizedWeight, dequantize_weight, quantize_weight, split_groups
from optimum_qvlm.spec import WeightSpec

BITS = range(2, 9)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

HALF_STEP = 0.5 * (1 + 1e-4)
"""Half a step; the margin covers the fp32 rounding of w / scale, where a quotient near 2^8 has an ulp of 2^-16."""


def random_weight(rows: int = 6, columns: int = 96, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with an all-zero row, where there are several rows."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if rows > 1:
        weight[1] = 0
    return weight.to(dtype)


def per_channel(values: Tensor, columns: int) -> Tensor:
    """What is held per group, spread over the channels of the group."""
    return values.float().repeat_interleave(columns // values.shape[1], dim=1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_scales_and_zero_points_are_those_of_compressed_tensors(bits, group, symmetric, shift):
    """Exported checkpoints must mean the same to other software, also where a row lies on one side of zero.

    Zero rows are apart: the scale 1 is our convention.
    """
    weight = random_weight()[2:] + shift

    actual = quantize_weight(weight, WeightSpec(bits=bits, group=group, symmetric=symmetric))

    grouped = split_groups(weight, WeightSpec(bits=bits, group=group))
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scale, zero_point = calculate_qparams(grouped.amin(dim=-1), grouped.amax(dim=-1), args)
    torch.testing.assert_close(actual.scale, scale, rtol=1e-6, atol=0)
    if symmetric:
        assert actual.zero_point is None
    else:
        assert torch.equal(actual.zero_point, zero_point.to(torch.int8))


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_scale_is_the_peak_over_half_the_number_of_steps(bits):
    weight = torch.tensor([[-3.0, 1.0], [0.5, 2.0]])

    scale = quantize_weight(weight, WeightSpec(bits=bits)).scale

    torch.testing.assert_close(scale, torch.tensor([[3.0], [2.0]]) / ((2**bits - 1) / 2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows, columns, group", [(1, 1, None), (1, 1, 1), (3, 129, None), (6, 96, 32), (33, 64, 64)])
def test_codes_and_scales_have_the_promised_form(bits, symmetric, rows, columns, group):
    weight = random_weight(rows, columns)
    groups = 1 if group is None else columns // group

    actual = quantize_weight(weight, WeightSpec(bits=bits, group=group, symmetric=symmetric))

    assert actual.codes.dtype == torch.int8 and actual.codes.shape == (rows, columns)
    assert actual.scale.dtype == torch.float32 and actual.scale.shape == (rows, groups)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert int(actual.codes.min()) >= low and int(actual.codes.max()) <= high
    if not symmetric:
        assert actual.zero_point.dtype == torch.int8 and actual.zero_point.shape == (rows, groups)
        assert int(actual.zero_point.min()) >= low and int(actual.zero_point.max()) <= high


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 24]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(FLOATS),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 2**16),
)
def test_error_inside_the_grid_is_at_most_half_a_step(bits, group, symmetric, scale_dtype, exponent, seed):
    """With the scales as stored: rounding them may push the peak a little off the grid, never anything else."""
    weight = random_weight(4, 24, seed=seed) * 2.0**exponent
    spec = WeightSpec(bits=bits, group=group, symmetric=symmetric)

    actual = quantize_weight(weight, spec, scale_dtype=scale_dtype)

    step = per_channel(actual.scale, 24)
    zero = 0.0 if symmetric else per_channel(actual.zero_point, 24)
    low = (-(2 ** (bits - 1)) - zero) * step
    high = (2 ** (bits - 1) - 1 - zero) * step
    inside = (weight >= low) & (weight <= high)
    error = (dequantize_weight(actual) - weight).abs()
    assert bool((error[inside] <= HALF_STEP * step[inside]).all())
    if scale_dtype == torch.float32:
        assert bool((error <= (1.0 if not symmetric else HALF_STEP) * step).all())


@given(bits=st.integers(2, 8), symmetric=st.booleans(), exponent=st.integers(-30, 30), seed=st.integers(0, 2**16))
def test_powers_of_two_change_scales_and_not_codes(bits, symmetric, exponent, seed):
    """Codes do not depend on the unit of the weight."""
    weight = random_weight(4, 32, seed=seed)
    spec = WeightSpec(bits=bits, group=16, symmetric=symmetric)

    actual, scaled = quantize_weight(weight, spec), quantize_weight(weight * 2.0**exponent, spec)

    assert torch.equal(scaled.codes, actual.codes)
    rows = weight.any(dim=1)
    assert torch.equal(scaled.scale[rows], actual.scale[rows] * 2.0**exponent)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
def test_codes_are_chosen_for_the_stored_scales(bits, symmetric, scale_dtype):
    """A bf16 scale is off by up to 0.4 %, which moves codes: they must fit what is read back."""
    weight = random_weight()
    spec = WeightSpec(bits=bits, group=32, symmetric=symmetric)

    actual = quantize_weight(weight, spec, scale_dtype=scale_dtype)

    assert actual.scale.dtype == scale_dtype
    step = per_channel(actual.scale, 96)
    zero = 0 if symmetric else per_channel(actual.zero_point, 96)
    best = (torch.round(weight / step) + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(actual.codes, best.to(torch.int8))
    stored = QuantizedWeight(actual.codes, actual.scale.clone(), actual.zero_point)
    assert torch.equal(dequantize_weight(stored), dequantize_weight(actual))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_have_the_dtype_of_the_weight_unless_another_is_asked_for(dtype, symmetric):
    weight = random_weight(dtype=dtype)
    spec = WeightSpec(bits=4, symmetric=symmetric)

    assert quantize_weight(weight, spec).scale.dtype == dtype
    assert quantize_weight(weight, spec, scale_dtype=torch.float32).scale.dtype == torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_get_scale_one_and_stay_zero(symmetric, bits, dtype):
    """Pruned rows must not become NaN."""
    weight = torch.zeros(3, 32, dtype=dtype)

    actual = quantize_weight(weight, WeightSpec(bits=bits, group=16, symmetric=symmetric))

    assert torch.equal(actual.scale, torch.ones(3, 2, dtype=dtype))
    assert torch.equal(dequantize_weight(actual), torch.zeros(3, 32))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [-5.0, -1.0, 0.0, 1.0, 5.0])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_an_asymmetric_grid_holds_zero_exactly(bits, shift, clip):
    """Zeros of a pruned weight stay zeros, also where the row lies on one side of zero."""
    weight = random_weight()[2:] + shift
    weight[:, ::7] = 0

    actual = quantize_weight(weight, WeightSpec(bits=bits, group=32, symmetric=False), clip=clip)

    assert bool((dequantize_weight(actual)[:, ::7] == 0).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [0, 1, -1])
def test_an_asymmetric_grid_gives_its_own_points_back(bits, offset):
    """Weights that lie on such a grid are kept to the last bit."""
    codes = torch.arange(2**bits).repeat(2)
    weight = (codes - 2 ** (bits - 1) + offset).float().unsqueeze(0) / 8

    actual = quantize_weight(weight, WeightSpec(bits=bits, symmetric=False))

    assert torch.equal(dequantize_weight(actual), weight)


@pytest.mark.parametrize("low", [0, -4, -5, -15])
def test_halves_round_to_even_steps_whatever_the_zero_point(low):
    """An odd zero point added before rounding would turn ties to the other side."""
    weight = torch.arange(2 * low, 2 * (low + 15) + 1).unsqueeze(0) / 2

    actual = quantize_weight(weight, WeightSpec(bits=4, symmetric=False))

    assert (actual.scale.item(), actual.zero_point.item()) == (1.0, -8 - low)
    assert torch.equal(dequantize_weight(actual), torch.round(weight))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_a_clip_per_group_is_a_clip_of_that_group(bits, symmetric, group):
    """The search gives one ratio per row and group."""
    weight = random_weight(5, 32)
    spec = WeightSpec(bits=bits, group=group, symmetric=symmetric)
    ratios = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.5]).unsqueeze(1).expand(5, spec.groups(32))

    actual = quantize_weight(weight, spec, clip=ratios)

    for row, ratio in enumerate([1.0, 0.9, 0.75, 0.6, 0.5]):
        alone = quantize_weight(weight[row : row + 1], spec, clip=ratio)
        assert torch.equal(actual.codes[row], alone.codes[0])
        assert torch.equal(actual.scale[row], alone.scale[0])


@pytest.mark.parametrize("bits", BITS)
def test_clip_shrinks_the_scale_and_saturates_the_rest(bits):
    weight = random_weight()[2:]

    full = quantize_weight(weight, WeightSpec(bits=bits))
    clipped = quantize_weight(weight, WeightSpec(bits=bits), clip=0.5)

    torch.testing.assert_close(clipped.scale, full.scale / 2)
    outside = weight.abs() > per_channel(clipped.scale, 96) * 2 ** (bits - 1)
    assert bool(outside.any())
    ends = torch.where(weight > 0, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))).to(torch.int8)
    assert torch.equal(clipped.codes[outside], ends[outside])


@given(
    bits=st.integers(2, 7),
    group=st.sampled_from([None, 8, 24]),
    clip=st.floats(0.5, 1.0),
    scale_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**16),
)
def test_a_signed_scale_puts_the_peak_on_the_lowest_code(bits, group, clip, scale_dtype, seed):
    """There is one step more on that side, so steps are smaller, and what lies between the ends is half a step off."""
    weight, spec = random_weight(4, 24, seed=seed), WeightSpec(bits=bits, group=group)

    plain = quantize_weight(weight, spec, clip=clip, scale_dtype=scale_dtype)
    actual = quantize_weight(weight, spec, clip=clip, scale_dtype=scale_dtype, signed=True)

    grouped, codes = split_groups(weight, spec), split_groups(actual.codes, spec)
    place = grouped.abs().argmax(-1, keepdim=True)
    peak = grouped.gather(-1, place)
    rows = peak != 0
    expected = (-clip * peak / 2 ** (bits - 1)).squeeze(-1)
    torch.testing.assert_close(actual.scale.float()[rows[..., 0]], expected[rows[..., 0]], rtol=2**-7, atol=0)
    assert bool((codes.gather(-1, place)[rows] == -(2 ** (bits - 1))).all())
    assert bool((actual.scale.abs() <= plain.scale).all())
    step = actual.scale.float().unsqueeze(-1)
    inside = (grouped / step <= 2 ** (bits - 1) - 0.5) & (grouped / step >= -(2 ** (bits - 1)) - 0.5)
    error = split_groups(dequantize_weight(actual) - weight, spec).abs()
    assert bool((error <= HALF_STEP * step.abs())[inside].all())


def test_signs_follow_the_peak_of_each_group():
    weight = torch.tensor([[3.0, -1.0, 1.0, -3.0, 2.0, -2.0, 0.0, 0.0]])

    actual = quantize_weight(weight, WeightSpec(bits=4, group=2), signed=True)

    assert actual.scale.sign().tolist() == [[-1.0, 1.0, 1.0, 1.0]]
    assert actual.scale.tolist() == [[-0.375, 0.375, 0.25, 1.0]]
    assert dequantize_weight(actual)[0, [0, 3, 4]].tolist() == [3.0, -3.0, 1.75]


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_need_no_signs(bits):
    """A grid with a zero point lies where the weights are already."""
    weight, spec = random_weight(), WeightSpec(bits=bits, group=32, symmetric=False)

    plain, actual = quantize_weight(weight, spec), quantize_weight(weight, spec, signed=True)

    assert torch.equal(actual.codes, plain.codes) and torch.equal(actual.scale, plain.scale)


def test_a_whole_number_is_a_clip_too():
    """Callers write clip=1, which type checkers accept for a float."""
    spec = WeightSpec(bits=4)

    assert torch.equal(
        quantize_weight(random_weight(), spec, clip=1).codes, quantize_weight(random_weight(), spec).codes
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype, magnitude", [(torch.float16, 1e-6), (torch.bfloat16, 1e-38), (torch.float32, 1e-38)])
def test_scales_that_underflow_are_the_smallest_normal(symmetric, dtype, magnitude):
    """A subnormal scale may be flushed to zero by a kernel; a zero scale would lose the row or divide by zero."""
    weight = random_weight()[2:].to(dtype) * magnitude

    actual = quantize_weight(weight, WeightSpec(bits=8, symmetric=symmetric))

    tiny = torch.finfo(dtype).tiny
    assert bool((actual.scale >= tiny).all())
    restored = dequantize_weight(actual)
    assert bool(torch.isfinite(restored).all())
    assert float((restored - weight.float()).abs().max()) <= tiny


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_values_of_a_dtype_stay_finite(symmetric, dtype, bits):
    top = torch.finfo(dtype).max / 4
    weight = torch.tensor([[top, -top, 0.0, top / 2]], dtype=dtype)

    actual = quantize_weight(weight, WeightSpec(bits=bits, symmetric=symmetric))

    error = (dequantize_weight(actual) - weight.float()).abs()
    assert bool((error <= actual.scale.float()).all())


@pytest.mark.parametrize("group, columns", [(64, 96), (2, 1), (128, 64)])
def test_a_group_that_does_not_divide_is_refused(group, columns):
    with pytest.raises(SpecError, match=f"group={group} does not divide in_features={columns}"):
        quantize_weight(torch.zeros(2, columns), WeightSpec(bits=4, group=group))


@pytest.mark.parametrize("group, shape", [(None, (6, 1, 96)), (32, (6, 3, 32)), (1, (6, 96, 1))])
def test_groups_are_consecutive_channels(group, shape):
    weight = random_weight()

    grouped = split_groups(weight, WeightSpec(bits=4, group=group))

    assert grouped.shape == shape
    assert torch.equal(grouped.reshape(6, 96), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
def test_dequantize_undoes_scale_and_zero_point(symmetric, group):
    actual = quantize_weight(random_weight(), WeightSpec(bits=5, group=group, symmetric=symmetric))

    zero = 0 if symmetric else per_channel(actual.zero_point, 96)
    expected = (actual.codes.float() - zero) * per_channel(actual.scale, 96)
    assert dequantize_weight(actual).dtype == torch.float32
    assert torch.equal(dequantize_weight(actual), expected)


def test_dequantize_does_not_wrap_around():
    """127 minus a zero point of -128 does not fit int8."""
    extremes = QuantizedWeight(
        torch.tensor([[127, -128]], dtype=torch.int8),
        torch.tensor([[1.0]]),
        torch.tensor([[-128]], dtype=torch.int8),
    )

    assert dequantize_weight(extremes).tolist() == [[255.0, 0.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_itself_is_left_alone(symmetric):
    weight = random_weight()
    before = weight.clone()

    quantize_weight(weight, WeightSpec(bits=4, symmetric=symmetric), clip=0.5)

    assert torch.equal(weight, before)
