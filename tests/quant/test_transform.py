"""Transforms of a site: what is done to activations is undone in the weights."""

import pytest
import torch

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import hadamard
from optimum_qvlm.quant.transform import SiteTransform


def equalizer(channels: int) -> torch.Tensor:
    """Positive factors over two orders of magnitude."""
    return torch.rand(channels, generator=torch.Generator().manual_seed(1)).mul(4).sub(2).exp()


TRANSFORMS = {
    "identity": SiteTransform(),
    "equalized": SiteTransform(equalizer(96)),
    "rotated": SiteTransform(None, 32),
    "both": SiteTransform(equalizer(96), 16),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_product_is_the_same(transform):
    """x W^T = (x T) (T^-1 W^T): without rounding a transform changes nothing."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 96, generator=generator), torch.randn(5, 96, generator=generator)

    actual = transform.tokens(x) @ transform.fold(weight).T

    assert torch.allclose(actual, x @ weight.T, rtol=1e-5, atol=1e-4)
    assert torch.allclose(transform.unfold(transform.fold(weight)), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_symmetric(size):
    """So its inverse is itself, and energies are kept."""
    matrix = hadamard(size)

    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_a_rotation_spreads_an_outlier_over_its_block():
    """That is what it is for: the peak of a block falls by the root of its size."""
    x = torch.zeros(1, 64)
    x[0, 3] = 8.0

    actual = SiteTransform(None, 16).tokens(x)

    assert torch.allclose(actual[0, :16].abs(), torch.full((16,), 2.0))
    assert torch.equal(actual[0, 16:], torch.zeros(48))


@pytest.mark.parametrize(
    "rotation, message",
    [(24, "rotation=24 is no power of two"), (64, "group=64 does not divide the 96 channels")],
)
def test_rotations_that_do_not_fit_are_refused(rotation, message):
    """The message names the number and the limit."""
    with pytest.raises(SpecError, match=message):
        SiteTransform(None, rotation).tokens(torch.ones(1, 96))
