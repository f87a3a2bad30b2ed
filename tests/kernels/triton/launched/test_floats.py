"""Products of unrounded activations with a weight that becomes floats in registers, and reductions that are shared."""

import dataclasses

import pytest
import torch

from optimum_qvlm.kernels import Rounding
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.kernels.triton import tiles
from optimum_qvlm.kernels.triton.decode import linear_decode
from optimum_qvlm.kernels.triton.floats import linear_floats, takes
from optimum_qvlm.kernels.triton.prefill import linear_prefill
from optimum_qvlm.kernels.triton.sums import add_parts
from tests.kernels.triton.launched.grid import (
    DEVICE,
    INTERPRETED,
    MARKS,
    ORDER,
    assert_product,
    make_activations,
    make_weight,
    pack,
)

COPIES = INTERPRETED or (torch.cuda.is_available() and tiles.architecture(DEVICE) >= tiles.BULK_COPIES)

pytestmark = [*MARKS, pytest.mark.skipif(not COPIES, reason="this device does not copy tiles")]

DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]

SIZES = [
    (72, 384, 45),
    (8, 256, 1),
    (136, 256, 0),
    *(
        pytest.param(*size, marks=[pytest.mark.slow] if INTERPRETED else [])
        for size in ((128, 256, 128), (200, 640, 130), (264, 1024, 600))
    ),
]
"""Rows, channels and tokens, ragged against tiles."""


def case(rows, channels, group, dtype):
    """A weight as the kernels read it, the same as codes and scales, with scales in the dtype of the activations."""
    weight, grid = make_weight(rows, channels, 4, group)
    weight = dataclasses.replace(weight, scale=weight.scale.to(dtype))
    grid = dataclasses.replace(grid, scale_dtype=dtype)
    return pack(weight.codes, weight.scale, None, 4), weight, grid


@pytest.fixture
def shared(monkeypatch):
    """Two programs for each tile of a weight with nine blocks of channels, whatever the device."""
    narrow = tiles.PrefillTile(tokens=32, rows=64, warps=4, stages=2, busy=64, share=512)
    few = tiles.DecodeTile(tokens=16, rows=16, slices=2, warps=2, stages=2, busy=64, share=512)
    assert [tile.parts(tiles.architecture(DEVICE), 4, 9 * 128) for tile in (narrow, few)] == [2, 2]
    monkeypatch.setattr(tiles, "floats_tile", lambda *_: narrow)
    monkeypatch.setattr(tiles, "prefill_tile", lambda *_: narrow)
    monkeypatch.setattr(tiles, "decode_tile", lambda *_: few)


@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, channels, tokens", SIZES)
def test_the_weight_is_rounded_once_and_summed_in_fp32(rows, channels, tokens, dtype, group):
    ready, weight, _ = case(rows, channels, group, dtype)
    x = make_activations(tokens, channels, dtype) / 8
    bias = torch.linspace(-1, 1, rows).to(DEVICE)

    y = linear_floats(x, ready, bias)

    assert y.shape == (tokens, rows) and y.dtype == dtype
    if y.numel() > 0:
        assert_product(y, x, weight, bias, dense=dtype, order=ORDER)


@pytest.mark.parametrize("group", [128, 64])
def test_programs_that_share_channels_give_the_same_product(shared, group):
    """The number of blocks is no multiple of the programs'; the bias is added once."""
    ready, weight, _ = case(72, 1152, group, torch.float16)
    x = make_activations(20, 1152, torch.float16) / 8
    bias = torch.linspace(-1, 1, 72).to(DEVICE)

    y, again = linear_floats(x, ready, bias), linear_floats(x, ready, bias)

    assert_product(y, x, weight, bias, dense=torch.float16, order=ORDER)
    assert torch.equal(again, y)


@pytest.mark.parametrize("bits, group", [(4, 128), (4, 32), (6, 128), (8, None)])
def test_other_products_are_shared_alike(shared, bits, group):
    """Few tokens, many that are not rounded, and codes."""
    weight, _ = make_weight(40, 1152, bits, group)
    ready = pack(weight.codes, weight.scale, None, bits)
    x = make_activations(12, 1152) / 8
    bias = torch.linspace(-1, 1, 40).to(DEVICE)
    codes = torch.randint(-127, 128, (12, 1152), generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.int8)
    scale = torch.linspace(0.01, 0.02, 12).to(DEVICE).unsqueeze(1)

    assert_product(linear_decode(x, ready, bias), x, weight, bias)
    assert_product(linear_prefill(x, None, ready, bias, torch.float32), x, weight, bias)
    y = linear_prefill(codes, scale, ready, bias, torch.float32)
    assert_product(y, codes * scale, weight, bias)


@pytest.mark.parametrize("rows", [1, 256, 300])
def test_parts_are_added_in_their_order(rows):
    parts = torch.randn(3, 5, rows, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bias = torch.linspace(-1, 1, rows).to(DEVICE)

    assert torch.equal(add_parts(parts, bias, torch.float32), parts[0] + parts[1] + parts[2] + bias)
    assert torch.equal(add_parts(parts, None, torch.float16), (parts[0] + parts[1] + parts[2]).half())


def test_what_it_takes(monkeypatch):
    """Symmetric weights of up to four bits with scales in the dtype of the activations, whose rows can be copied."""
    monkeypatch.setattr(tiles, "BULK_COPIES", 80)
    ready, _, _ = case(64, 256, 128, torch.float16)
    x = torch.ones(64, 256, dtype=torch.float16, device=DEVICE)

    assert takes(x, ready)
    assert not takes(x.float(), ready) and not takes(x.to(torch.bfloat16), ready)
    assert not takes(x.expand(tiles.DENSE_TOKENS, -1, -1).flatten(0, 1), ready)
    assert not takes(x.repeat(1, 2)[:, 1:257], ready)
    assert not takes(x, case(63, 256, 128, torch.float16)[0])
    assert not takes(x, case(64, 256, 32, torch.float16)[0])
    zero, _ = make_weight(64, 256, 4, 128, zero_point=True)
    assert not takes(x, pack(zero.codes, zero.scale.half(), zero.zero_point, 4))
    assert not takes(x, case(64, 256, None, torch.float16)[0])


def test_what_a_module_calls_is_the_definition(monkeypatch):
    monkeypatch.setattr(tiles, "BULK_COPIES", 80)
    _, weight, grid = case(48, 256, 128, torch.float16)
    x = make_activations(40, 256, torch.float16) / 8

    y = triton_linear.linear(x, triton_linear.store(weight, grid), None, Rounding(), grid)

    assert_product(y, x, weight, dense=torch.float16, order=ORDER)
