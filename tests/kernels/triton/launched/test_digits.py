"""Products of a few tokens that come as digits, against the definition."""

import pytest
import torch

from optimum_qvlm.kernels import QuantizedWeight, Rounding, reference
from optimum_qvlm.kernels.triton import digits as triton_digits
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.kernels.triton import quantize as triton_quantize
from optimum_qvlm.kernels.triton import tiles
from tests.kernels.triton.launched.grid import (
    DEVICE,
    DTYPES_TO_LAUNCH,
    MARKS,
    assert_product,
    make_activations,
    make_weight,
    pack,
)

pytestmark = MARKS

WEIGHS = torch.tensor([1.0, 256.0, 65536.0, 16777216.0], dtype=torch.float64)


def whole(digits, scale):
    """What digits [tokens, 4, width] with scales [tokens, width / 128] stand for, fp64 [tokens, width]."""
    integers = (digits.double() * WEIGHS.to(digits.device)[:, None]).sum(1)
    return (integers.unflatten(1, (-1, 128)) * scale.double().unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("bits, group", [(4, 128), (4, 256), (3, 128), (2, 384)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_a_product_of_digits_is_the_definition(dtype, tokens, bits, group):
    """Rows are no multiple of a program's, nor blocks of what a step takes."""
    weight, grid = make_weight(37, 3 * group, bits, group)
    x = make_activations(tokens, grid.in_features, dtype)
    packed = pack(weight.codes, weight.scale, None, bits)
    bias = torch.randn(37, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    assert triton_digits.takes(tokens, packed)

    y = triton_digits.linear_digits(*triton_quantize.split(x, Rounding(), packed.width), packed, bias, dtype)

    assert y.dtype == dtype
    assert_product(y, x, weight, bias)


@pytest.mark.parametrize("parts", [2, 5])
def test_programs_that_share_digits_give_the_same_product(parts, monkeypatch):
    weight, _ = make_weight(21, 1920, 4, 128)
    x = make_activations(3, 1920)
    packed = pack(weight.codes, weight.scale, None, 4)
    shared = tiles.DecodeTile(tokens=4, rows=16, slices=2, warps=2, stages=1)
    monkeypatch.setattr(tiles, "digits_tile", lambda *_: shared)
    monkeypatch.setattr(tiles.DecodeTile, "parts", lambda *_: parts)

    y = triton_digits.linear_digits(*triton_quantize.split(x, Rounding(), 1920), packed, None, torch.float32)

    assert_product(y, x, weight)


@pytest.mark.parametrize("equalized", [False, True])
@pytest.mark.parametrize("channels, rotation", [(384, None), (200, None), (384, 128), (96, 32)])
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_digits_are_the_transformed_activations(dtype, channels, rotation, equalized):
    """To 2**-29 of the largest of 128 channels, and exactly where a dtype has few bits; nothing in the padding."""
    x = make_activations(3, channels, dtype)
    equalizer = (torch.rand(channels, generator=torch.Generator().manual_seed(1)) + 0.5).to(DEVICE)
    rounding = Rounding(rotation=rotation, equalizer=equalizer if equalized else None)
    width = channels + -channels % 128

    digits, scale = triton_quantize.split(x, rounding, width)

    expected = torch.zeros(3, width, dtype=torch.float64, device=DEVICE)
    expected[:, :channels] = triton_quantize.transform(x, rounding).double()
    peak = expected.unflatten(1, (-1, 128)).abs().amax(2, keepdim=True)
    error = (whole(digits, scale) - expected).unflatten(1, (-1, 128)).abs()
    assert bool((error <= 2.0**-29 * peak).all())
    assert not digits[:, :, channels:].any()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e30, 3e38])
def test_digits_of_any_size(size):
    """From the smallest float on; below 2**-97 digits count in units of 2**-126."""
    x = torch.tensor([[size, -size / 2] + [0.0] * 126], device=DEVICE)

    found = whole(*triton_quantize.split(x, Rounding(), 128))

    assert float((found - x.double()).abs().max()) <= max(2.0**-29 * size, 2.0**-126)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_number_gives_none(value):
    """In its token, and not in others."""
    weight, grid = make_weight(16, 256, 4, 128)
    x = make_activations(2, 256)
    x[0, 5] = value

    y = triton_linear.linear(x, triton_linear.store(weight, grid), None, Rounding(), grid)

    assert not torch.isfinite(y[0]).any()
    assert bool(torch.isfinite(y[1]).all())


def test_a_few_tokens_go_through_digits_and_more_do_not(monkeypatch):
    """A rotated site's, whose pass over the activations makes the digits too."""
    weight, grid = make_weight(16, 256, 4, 128)
    stored = triton_linear.store(weight, grid)
    calls = []
    split = triton_quantize.split
    monkeypatch.setattr(triton_linear, "split", lambda *given: calls.append(len(given[0])) or split(*given))

    for tokens in (1, tiles.DIGITS_TOKENS, tiles.DIGITS_TOKENS + 1):
        x = make_activations(tokens, 256)
        y = triton_linear.linear(x, stored, None, Rounding(rotation=128), grid)
        assert_product(y, reference.transform_tokens(x, None, 128), weight, order=2.0**-17)

    assert calls == [1, tiles.DIGITS_TOKENS]


@pytest.mark.parametrize("change", ["bits", "zero", "group", "row"])
def test_other_weights_are_left_to_the_other_kernel(change):
    bits = 6 if change == "bits" else 4
    group = {"group": 64, "row": None}.get(change, 128)
    weight, _ = make_weight(16, 256, bits, group, zero_point=change == "zero")

    assert not triton_digits.takes(1, pack(weight.codes, weight.scale, weight.zero_point, bits))


def test_a_large_channel_does_not_cost_the_others_their_digits():
    """Codes of zero at the largest: what is left is the rest, to 2**-29 of the largest each."""
    codes = torch.ones(16, 128, dtype=torch.int8, device=DEVICE)
    codes[:, 0] = 0
    x = torch.full((1, 128), 1e-3, device=DEVICE)
    x[0, 0] = 1e3
    weight = QuantizedWeight(torch.cat((codes, codes), 1), torch.ones(16, 2, device=DEVICE))
    packed = pack(weight.codes, weight.scale, None, 4)

    y = triton_digits.linear_digits(
        *triton_quantize.split(torch.cat((x, x), 1), Rounding(), 256), packed, None, torch.float32
    )

    assert float((y - 0.254).abs().max()) < 254 * 2.0**-29 * 1e3
