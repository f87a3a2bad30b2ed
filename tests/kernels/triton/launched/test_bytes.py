"""The kernel that multiplies int8 codes with int8 weights tile by tile, against the definition."""

import pytest
import torch

from optimum_qvlm.kernels import Rounding
from optimum_qvlm.kernels.triton import quantize as triton_quantize
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.bytes import LEAST_ARCHITECTURE, LEAST_TOKENS, linear_bytes, takes
from optimum_qvlm.kernels.triton.layout import PackedWeight
from tests.kernels.triton.launched.grid import (
    DEVICE,
    DTYPES_TO_LAUNCH,
    INTERPRETED,
    MARKS,
    assert_product,
    make_activations,
    make_weight,
    pack,
)

COPIES = INTERPRETED or (torch.cuda.is_available() and tiles.architecture(DEVICE) >= LEAST_ARCHITECTURE)

SIZES = [
    (70, 300, 45),
    (1, 16, 1),
    (129, 384, 0),
    *(
        pytest.param(*size, marks=[pytest.mark.slow] if INTERPRETED else [])
        for size in ((128, 128, 128), (200, 256, 130))
    ),
]

pytestmark = [*MARKS, pytest.mark.skipif(not COPIES, reason="this device does not copy tiles")]


def packed(rows: int, channels: int) -> tuple[PackedWeight, tuple]:
    weight, grid = make_weight(rows, channels, 8, None)
    return pack(weight.codes, weight.scale, None, 8), (weight, grid)


@pytest.mark.parametrize("activation", ["token", "static"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, channels, tokens", SIZES)
def test_products_of_any_size_are_exact_up_to_their_scales(rows, channels, tokens, biased, activation):
    """Tiles reach past the last row and token, and past the channels into the padding."""
    ready, (weight, _) = packed(rows, channels)
    x = make_activations(tokens, channels)
    fixed = torch.tensor([0.03], device=DEVICE) if activation == "static" else None
    codes, scale = triton_quantize.quantize_padded(x, Rounding(bits=8, scale=fixed), ready.width)
    bias = torch.linspace(-3, 3, rows, device=DEVICE) if biased else None

    y = linear_bytes(codes, scale, ready, bias, torch.float32)

    assert y.shape == (tokens, rows)
    if tokens > 0:
        assert_product(y, (codes * scale)[:, :channels], weight, bias)


@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_the_result_is_rounded_once(dtype):
    ready, (weight, _) = packed(64, 256)
    codes, scale = triton_quantize.quantize_padded(make_activations(9, 256, dtype), Rounding(bits=8), 256)

    y = linear_bytes(codes, scale, ready, None, dtype)

    assert y.dtype == dtype
    assert_product(y, codes * scale, weight)


def test_the_largest_codes_do_not_overflow():
    """Sums of a row as long as a decoder's are integers below 2**31."""
    codes = torch.full((2, 16384), -128, dtype=torch.int8, device=DEVICE)
    ready = pack(codes, torch.ones(2, 1, device=DEVICE), None, 8)
    x = torch.full((3, 16384), -127, dtype=torch.int8, device=DEVICE)

    y = linear_bytes(x, torch.ones(1, device=DEVICE), ready, None, torch.float32)

    assert y.tolist() == [[128.0 * 127 * 16384] * 2] * 3


@pytest.mark.skipif(INTERPRETED, reason="a CPU copies nothing")
def test_what_it_takes_is_what_it_computes():
    """Everything else goes to the other kernel, with the same result."""
    ready, (weight, _) = packed(64, 256)
    enough = torch.ones(LEAST_TOKENS, 256, dtype=torch.int8, device=DEVICE)

    assert takes(enough, ready)
    assert not takes(enough[:-1], ready)
    assert not takes(enough.repeat(1, 2)[:, ::2], ready)
    four, _ = make_weight(64, 256, 4, 128)
    assert not takes(enough, pack(four.codes, four.scale, None, 4))
    scale = torch.ones(LEAST_TOKENS, 1, device=DEVICE)
    y = linear_bytes(enough, scale, ready, None, torch.float32)
    assert_product(y, enough.float(), weight)
