"""Rounding channel after channel in one launch, against the definitions, which run on the CPU."""

import pytest
import torch

from optimum_qvlm.kernels import recursion
from optimum_qvlm.kernels.triton import recursion as triton_recursion
from tests.kernels.triton.launched.grid import DEVICE, INTERPRETED, MARKS

pytestmark = MARKS

SIZES = [
    (48, 40),
    (16, 7),
    (1, 1),
    *(pytest.param(*size, marks=[pytest.mark.slow] if INTERPRETED else []) for size in ((64, 40), (128, 33))),
]
"""Channels and rows: ragged against programs, and channels that are no power of two."""


def hessian(channels, seed=0):
    x = torch.randn(4 * channels, channels, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x) + 0.01 * torch.eye(channels)


def on_device(*tensors):
    return [None if tensor is None else tensor.clone().to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("channels, rows", SIZES)
def test_error_feedback_rounds_as_the_definition(channels, rows, bits, zero_point, by_channel):
    """Sums differ in their last bit, so a value on the boundary of two codes may fall on its other side; few do."""
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(channels, rows, generator=generator)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian(channels)), upper=True)
    shape = (channels, rows) if by_channel else (rows,)
    scale = (torch.rand(shape, generator=generator) + 0.5) * 2.5 / 2 ** (bits - 1)
    scale = torch.where(torch.rand(shape, generator=generator) < 0.5, -scale, scale)
    zero = torch.randint(-3, 4, shape, generator=generator).to(torch.int8) if zero_point else None
    moved = on_device(block, factor, scale, zero)

    codes, errors = triton_recursion.feed_back(moved[0], moved[1], bits, moved[2], moved[3])

    expected, wanted_errors = recursion.feed_back(block.clone(), factor, bits, scale, zero)
    apart = (codes.cpu() != expected).any(0)
    assert int(apart.sum()) <= 1 + rows // 20
    assert float(codes.min()) >= -(2 ** (bits - 1)) and float(codes.max()) <= 2 ** (bits - 1) - 1
    torch.testing.assert_close(errors.cpu()[:, ~apart], wanted_errors[:, ~apart], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels, rows", SIZES)
def test_descent_moves_codes_as_the_definition(channels, rows):
    """Codes are changed in place, and what changed is returned."""
    generator = torch.Generator().manual_seed(2)
    curvature = hessian(channels)
    target = torch.randn(channels, rows, generator=generator)
    scale = (torch.rand(rows, generator=generator) + 0.5) * 0.3
    low, high = torch.full((rows,), -8.0), torch.full((rows,), 7.0)
    codes = (target / scale + torch.randn(channels, rows, generator=generator)).round().clamp(-8, 7)
    slope = curvature @ (target - codes * scale)
    moved = on_device(codes, slope, curvature, scale, low, high)

    change = triton_recursion.descend(*moved)

    expected = codes.clone()
    wanted_change = recursion.descend(expected, slope.clone(), curvature, scale, low, high)
    same = (moved[0].cpu() == expected).all(0)
    assert int((~same).sum()) <= 1 + rows // 20
    torch.testing.assert_close(change.cpu()[:, same], wanted_change[:, same], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((moved[0].cpu() - codes) * scale, change.cpu(), rtol=1e-5, atol=1e-6)


def test_values_far_outside_the_grid_saturate():
    """Rounding to nearest by adding a large number would go wrong there."""
    block = torch.tensor([[1e30, -1e30, 1e9, -1e9, 0.0]], device=DEVICE)

    codes, _ = triton_recursion.feed_back(block, torch.ones(1, 1, device=DEVICE), 4, torch.ones(5, device=DEVICE), None)

    assert codes.tolist() == [[7.0, -8.0, 7.0, -8.0, 0.0]]
