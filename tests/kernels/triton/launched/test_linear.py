"""The products of quantized linears against the definition: few tokens, many, whole bytes, dense."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optimum_qvlm.kernels import QuantizedWeight, Rounding, dequantize_tokens, reference
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.kernels.triton import quantize as triton_quantize
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.decode import linear_decode
from optimum_qvlm.kernels.triton.dequantize import dequantize
from optimum_qvlm.kernels.triton.prefill import linear_prefill
from optimum_qvlm.kernels.triton.unpack import load_weight
from tests.kernels.triton.launched.grid import (
    DEVICE,
    DTYPES_TO_LAUNCH,
    FORMATS,
    FORMATS_TO_LAUNCH,
    INTERPRETED,
    MARKS,
    assert_product,
    make_activations,
    make_weight,
    pack,
)

pytestmark = MARKS

ALL_FORMATS = pytest.mark.parametrize("bits, group", FORMATS_TO_LAUNCH)
ZERO_POINT = pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "zero point"])


def channels_for(group):
    """Ragged against blocks of 128 and against what a decoding program takes per step, where the group allows."""
    if group is None:
        return 200
    return {128: 640, 256: 768}.get(group, 3 * group + 128)


def packed(weight, bits):
    return pack(weight.codes, weight.scale, weight.zero_point, bits)


def bias_for(rows):
    return torch.randn(rows, generator=torch.Generator().manual_seed(5)).to(DEVICE)


@ZERO_POINT
@ALL_FORMATS
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_few_tokens_are_multiplied_as_they_are(dtype, bits, group, zero_point):
    """Rows are no multiple of a program's, and the first token is zero."""
    weight, grid = make_weight(21, channels_for(group), bits, group, zero_point=zero_point)
    x = make_activations(3, grid.in_features, dtype) / 8

    y = linear_decode(x, packed(weight, bits), bias_for(21))

    assert y.dtype == dtype
    assert_product(y, x, weight, bias_for(21))


@ZERO_POINT
@ALL_FORMATS
@pytest.mark.parametrize("activation", ["token", "group", "static"])
def test_integer_activations_are_multiplied_exactly(activation, bits, group, zero_point):
    """Only the sum over groups rounds."""
    weight, grid = make_weight(21, channels_for(group), bits, group, zero_point=zero_point)
    x = make_activations(5, grid.in_features)
    ready = packed(weight, bits)
    rounding = Rounding(
        bits=8,
        group=ready.group if activation == "group" else None,
        scale=torch.tensor([0.03], device=DEVICE) if activation == "static" else None,
    )
    codes, scale = triton_quantize.quantize_padded(x, rounding, ready.width)

    y = linear_prefill(codes, scale, ready, bias_for(21), torch.float32)

    rounded = codes * scale if activation == "static" else dequantize_tokens(codes, scale)
    assert_product(y, rounded[:, : grid.in_features], weight, bias_for(21))


@ZERO_POINT
@ALL_FORMATS
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_many_tokens_that_are_not_rounded(dtype, bits, group, zero_point):
    weight, grid = make_weight(21, channels_for(group), bits, group, zero_point=zero_point)
    x = make_activations(5, grid.in_features, dtype) / 8

    y = linear_prefill(x, None, packed(weight, bits), None, dtype)

    assert_product(y, x, weight)


@ZERO_POINT
@ALL_FORMATS
def test_the_dequantized_weight_is_the_definition(bits, group, zero_point):
    weight, _ = make_weight(21, channels_for(group), bits, group, zero_point=zero_point)

    found = dequantize(packed(weight, bits), torch.float32)

    assert torch.equal(found, reference.dequantize_rows(weight, 0, 21))


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4", "w6a6", "w8a8"])
@pytest.mark.parametrize(
    "tokens", [1, 17, 40, pytest.param(65, marks=pytest.mark.slow), pytest.param(600, marks=pytest.mark.slow)]
)
def test_every_scheme_at_every_bucket_of_tokens(tokens, scheme):
    """Each bucket has tiles of its own; rows and tokens are ragged against all of them."""
    bits, activation = int(scheme[1]), int(scheme[3:])
    weight, grid = make_weight(130, 256, bits, None if bits == 8 else 128)
    x = make_activations(tokens, 256, torch.float32 if INTERPRETED else torch.float16)
    rounding = Rounding(
        bits=None if activation == 16 else activation,
        group=128 if activation < 8 else None,
        clip=1.0 if activation == 16 else 0.9,
    )
    stored = triton_linear.store(weight, grid)

    y = triton_linear.linear(x, stored, bias_for(130), rounding, grid)

    dense = x.dtype if activation == 16 and tokens >= tiles.FLOAT_TOKENS and x.dtype != torch.float32 else None
    assert_product(y, reference.round_tokens(x, rounding), weight, bias_for(130), dense=dense)


@pytest.mark.parametrize("rotation", [None, 8, 64])
@pytest.mark.parametrize("activation", [8, 16])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64)], ids=str)
def test_transforms_and_leading_dimensions(shape, activation, rotation):
    """What a module calls: the definition up to one step of an activation code."""
    weight, grid = make_weight(9, 64, 4, 32)
    x = make_activations(6, 64).flatten()[: torch.Size(shape).numel()].view(shape)
    equalizer = torch.linspace(0.5, 2, 64).to(DEVICE)
    rounding = Rounding(bits=None if activation == 16 else activation, equalizer=equalizer, rotation=rotation)

    y = triton_linear.linear(x, triton_linear.store(weight, grid), None, rounding, grid)

    expected = reference.linear(x, weight, None, rounding)
    assert y.shape == expected.shape
    if y.numel() > 0:
        assert float((y - expected).norm()) <= 0.01 * float(expected.norm())


def test_products_are_the_same_bits_in_every_run():
    """Sums are taken in a fixed order."""
    weight, _ = make_weight(40, 1000, 8, None)
    x = make_activations(3, 1000)
    runs = 2 if INTERPRETED else 50

    results = [linear_decode(x, packed(weight, 8), None) for _ in range(runs)]

    assert all(torch.equal(result, results[0]) for result in results)


def test_extreme_values_stay_finite():
    """The largest codes of both sides, over a row as long as integer sums meet."""
    codes = torch.full((2, 4096), -128, dtype=torch.int8, device=DEVICE)
    weight = QuantizedWeight(codes, torch.ones(2, 1, device=DEVICE))
    ready = pack(weight.codes, weight.scale, None, 8)
    x = torch.full((2, 4096), -127, dtype=torch.int8, device=DEVICE)

    y = linear_prefill(x, torch.ones(1, device=DEVICE), ready, None, torch.float32)

    assert y.tolist() == [[128.0 * 127 * 4096] * 2] * 2


def test_rows_past_two_to_the_31_bytes_are_reached():
    """The last row of a weight that lies that far behind the first, read as a vocabulary's would be."""
    width = 2**30 + 128
    storage = torch.empty(3 * width, dtype=torch.int8, device=DEVICE)
    codes = storage.as_strided((3, width), (width, 1))
    codes[:, :128] = make_weight(3, 128, 8, None)[0].codes

    assert codes[2].data_ptr() - codes[0].data_ptr() > 2**31
    x = make_activations(2, 128)
    y = _first_block_product(x, codes)

    assert_product(y, x, QuantizedWeight(codes[:, :128].contiguous(), torch.ones(3, 1, device=DEVICE)))


def _first_block_product(x, codes):
    """A product over the first block of every row, with the rows where they are."""
    y = x.new_empty(2, 3)
    first_block_kernel[(1,)](x, codes, y, WIDTH=codes.shape[1])
    return y


@triton.jit
def first_block_kernel(x, codes, y, WIDTH: tl.constexpr):
    row = tl.arange(0, 16)[:, None]
    token = tl.arange(0, 16)[None, :]
    offset = tl.arange(0, 64)
    w_row = codes + tl.minimum(row, 2).to(tl.int64) * WIDTH
    first, second = load_weight(w_row, 0, offset[None, :], 0, WIDTH, 8, tl.float32, False)
    place = x + tl.minimum(token, 1) * 128 + offset[:, None]
    sums = tl.dot(first, tl.load(place), input_precision="ieee")
    sums = tl.dot(second, tl.load(place + 64), sums, input_precision="ieee")
    tl.store(y + token * 3 + row, sums, mask=(row < 3) & (token < 2))


@settings(max_examples=20 if INTERPRETED else 300)
@given(
    format=st.sampled_from(FORMATS),
    zero_point=st.booleans(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    tokens=st.integers(1, 20),
    activation=st.sampled_from([16, 8, 6, 4, 2]),
    grouped=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(format=(6, 16), zero_point=True, rows=17, groups=2, tokens=6, activation=16, grouped=False, seed=148)
def test_any_size_is_the_definition(format, zero_point, rows, groups, tokens, activation, grouped, seed):
    bits, group = format
    channels = 37 * groups if group is None else group * groups
    weight, grid = make_weight(rows, channels, bits, group, zero_point=zero_point, seed=seed)
    x = make_activations(tokens, channels, seed=seed)
    rounding = Rounding(
        bits=None if activation == 16 else activation, group=group if grouped and activation < 16 else None
    )

    y = triton_linear.linear(x, triton_linear.store(weight, grid), None, rounding, grid)

    assert_product(y, reference.round_tokens(x, rounding), weight)
