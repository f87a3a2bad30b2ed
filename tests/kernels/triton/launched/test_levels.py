"""Products with weights whose scales are on two levels, against the definition: in registers, and written as bytes."""

import pytest
import torch

from optimum_qvlm.kernels import Rounding, reference
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.kernels.triton import quantize as triton_quantize
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.levels import fits_registers, linear_in_registers, linear_levels, takes, written
from tests.kernels.triton.launched.grid import (
    DEVICE,
    DTYPES_TO_LAUNCH,
    INTERPRETED,
    MARKS,
    assert_product,
    make_activations,
    make_levels,
    pack,
)

COPIES = INTERPRETED or (torch.cuda.is_available() and tiles.architecture(DEVICE) >= tiles.BULK_COPIES)

needs_copies = pytest.mark.skipif(not COPIES, reason="this device does not copy tiles")

SIZES = [
    (72, 384, 45),
    (8, 256, 1),
    (136, 256, 0),
    *(
        pytest.param(*size, marks=[pytest.mark.slow] if INTERPRETED else [])
        for size in ((128, 256, 128), (200, 640, 130))
    ),
]

pytestmark = MARKS


def packed(rows: int, channels: int, group: int, bits: int = 4, dtype: torch.dtype = torch.float32):
    weight, grid = make_levels(rows, channels, bits, group, dtype=dtype)
    return pack(weight.codes, weight.scale, None, bits, two_level=True), weight, grid


@needs_copies
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("activation", ["token", "static"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, channels, tokens", SIZES)
def test_products_of_any_size_are_exact_up_to_their_scales(rows, channels, tokens, biased, activation, group):
    """Tiles reach past the last row and token; every code meets every multiple of either sign."""
    ready, weight, _ = packed(rows, channels, group)
    x = make_activations(tokens, channels)
    fixed = torch.tensor([0.03], device=DEVICE) if activation == "static" else None
    codes, scale = triton_quantize.quantize_padded(x, Rounding(bits=8, scale=fixed), ready.width)
    bias = torch.linspace(-3, 3, rows, device=DEVICE) if biased else None

    y = linear_in_registers(codes, scale, ready, bias, torch.float32)

    assert y.shape == (tokens, rows)
    if tokens > 0:
        assert_product(y, (codes * scale)[:, :channels], weight, bias)


@needs_copies
def test_channels_past_the_last_whole_block_are_padding():
    """Two groups of 64 and half a block more: the scales of padding are zero, and so are its codes."""
    ready, weight, _ = packed(16, 192, 64)
    codes, scale = triton_quantize.quantize_padded(make_activations(5, 192), Rounding(bits=8), ready.width)

    y = linear_in_registers(codes, scale, ready, None, torch.float32)

    assert_product(y, (codes * scale)[:, :192], weight)


@needs_copies
@pytest.mark.parametrize("dtype", DTYPES_TO_LAUNCH)
def test_the_result_is_rounded_once(dtype):
    """Scales of the dtype that weights have, in which steps are exact."""
    ready, weight, _ = packed(64, 256, 128, dtype=torch.float16 if INTERPRETED else dtype)
    codes, scale = triton_quantize.quantize_padded(make_activations(9, 256, dtype), Rounding(bits=8), 256)

    y = linear_in_registers(codes, scale, ready, None, dtype)

    assert y.dtype == dtype
    assert_product(y, codes * scale, weight)


@pytest.mark.parametrize("rows, channels, group", [(70, 384, 128), (5, 96, 32), (33, 80, 16), (1, 192, 64)])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_written_weight_is_the_same_weight_in_eight_bits(rows, channels, group, bits):
    """Bit for bit: codes times multiples are whole numbers, and step times multiple is the scale."""
    ready, weight, _ = packed(rows, channels, group, bits)

    whole = written(ready)

    assert (whole.bits, whole.group, whole.two_level) == (8, None, False)
    values = whole.codes[:, :channels].float() * whole.scale.T
    assert torch.equal(values, reference.dequantize_rows(weight, 0, rows))
    assert not whole.codes[:, channels:].any()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_every_code_times_every_multiple(scale_dtype):
    """All products that there are, of which the largest is 120."""
    codes = torch.arange(-8, 8, dtype=torch.int8, device=DEVICE).repeat(30, 8)
    signed = torch.cat((torch.arange(-15, 0), torch.arange(1, 16))).to(DEVICE)
    scale = torch.stack((signed, torch.ones_like(signed)), dim=1).to(scale_dtype) * 2**-5

    whole = written(pack(codes.repeat(1, 2), scale, None, 4, two_level=True))

    assert torch.equal(whole.scale, torch.full((1, 30), 2**-5, dtype=scale_dtype, device=DEVICE))
    assert torch.equal(whole.codes[:, :128], (codes * signed.unsqueeze(1)).to(torch.int8))
    assert int(whole.codes.max()) == 120


@needs_copies
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_a_module_calls_is_the_definition(group, monkeypatch):
    """With few tokens and more, in registers and, where a group is too small for that, written."""
    monkeypatch.setattr(tiles, "LEVELS_TOKENS", 6)
    monkeypatch.setattr(tiles, "WRITTEN_TOKENS", 12)
    monkeypatch.setattr(tiles, "BULK_COPIES", 80)
    weight, grid = make_levels(40, 256, 4, group)
    stored = triton_linear.store(weight, grid)
    rounding = Rounding(bits=8, clip=0.9)
    for tokens in (3, 6, 12):
        x = make_activations(tokens, 256)

        y = triton_linear.linear(x, stored, None, rounding, grid)

        assert_product(y, reference.round_tokens(x, rounding), weight)


@pytest.mark.skipif(INTERPRETED or not COPIES, reason="a CPU copies nothing")
def test_what_it_takes_is_what_it_computes():
    """Few tokens, tokens with a scale per group and scales on one level go to the kernel that rescales."""
    ready, weight, _ = packed(64, 256, 128)
    enough = torch.ones(tiles.LEVELS_TOKENS, 256, dtype=torch.int8, device=DEVICE)
    scale = torch.ones(tiles.LEVELS_TOKENS, 1, device=DEVICE)

    assert takes(enough, scale, ready)
    assert not takes(enough[:-1], scale[:-1], ready)
    assert not takes(enough, scale.repeat(1, 2), ready)
    assert not takes(enough, scale, packed(64, 256, 32)[0])
    assert fits_registers(ready) and not fits_registers(packed(63, 256, 128)[0])
    plain = pack(weight.codes, weight.scale, None, 4)
    assert not takes(enough, scale, plain)
    assert_product(linear_levels(enough, scale, ready, None, torch.float32), enough.float(), weight)
