"""Static ranges: quantiles of magnitudes, each the magnitude of an element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_qvlm.kernels import quantize_static
from optimum_qvlm.quant.observers import magnitude_quantiles, static_scale


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), count=st.integers(1, 300), share=st.floats(0.001, 1.0))
def test_a_quantile_is_the_smallest_magnitude_that_covers_its_share(seed, count, share):
    """By the definition, in pure Python."""
    x = normal(count, seed=seed)
    ordered = sorted(abs(value) for value in x.tolist())

    actual = float(magnitude_quantiles(x, [share]))

    assert actual == ordered[max(math.ceil(share * count - 1e-6), 1) - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_shares_are_read_in_their_order(dtype):
    x = (normal(10, 50) * 3).to(dtype)

    actual = magnitude_quantiles(x, [0.98, 1.0, 0.99])

    assert actual.dtype == torch.float32
    assert actual[1] == x.abs().max().float()
    assert actual[0] <= actual[2] <= actual[1]


def test_signs_do_not_matter():
    x = normal(200)

    assert torch.equal(magnitude_quantiles(x, [0.9]), magnitude_quantiles(-x.abs(), [0.9]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_code_stands_for_the_quantile(bits):
    """With the whole range no code saturates, and the peak has the largest."""
    x = normal(8, 16)

    scale = static_scale(x, bits, 1.0)

    codes = quantize_static(x, bits, scale)
    assert scale.shape == (1,) and scale.dtype == torch.float32
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    assert bool(((codes * scale - x).abs() <= 0.5001 * scale).all())


def test_a_smaller_share_has_a_smaller_step():
    """One outlier of a hundred is left out."""
    x = torch.ones(100)
    x[3] = 50.0

    assert float(static_scale(x, 8, 0.99)) == pytest.approx(1 / 127)
    assert float(static_scale(x, 8, 1.0)) == pytest.approx(50 / 127)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_zeros_have_the_scale_one(share):
    """Nothing divides by zero."""
    assert float(static_scale(torch.zeros(3, 4), 4, share)) == 1.0
