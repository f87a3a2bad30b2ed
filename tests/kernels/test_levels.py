"""The step behind scales that are multiples of it: found exactly, or refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels.levels import LARGEST_MULTIPLE, common_step

SPARE_BITS = {torch.float32: 20, torch.float16: 7, torch.bfloat16: 4}
"""Significant bits of a dtype that are left to a step whose multiples are exact."""


@given(
    dtype=st.sampled_from(list(SPARE_BITS)),
    exponent=st.integers(-13, 4),
    multiples=st.lists(st.integers(1, LARGEST_MULTIPLE), min_size=1, max_size=40),
    seed=st.integers(0, 2**16),
)
def test_every_scale_is_a_whole_multiple_of_what_is_found(dtype, exponent, multiples, seed):
    """Kernels divide by it and take the quotient for a whole number."""
    generator = torch.Generator().manual_seed(seed)
    bits = SPARE_BITS[dtype]
    mantissas = torch.randint(2 ** (bits - 1), 2**bits, (5, 1), generator=generator)
    signs = torch.randint(2, (5, len(multiples)), generator=generator) * 2 - 1
    exact = mantissas * torch.tensor(multiples) * signs * 2.0 ** (exponent - bits)
    scale = exact.to(dtype)
    assert torch.equal(scale.double(), exact.double()), "the scales of this test have to be exact"

    step = common_step(scale)

    actual = scale.double() / step.double().unsqueeze(1)
    assert step.dtype == dtype and step.shape == (5,)
    assert torch.equal(actual, actual.round())
    assert float(actual.abs().max()) <= LARGEST_MULTIPLE
    assert bool((actual.abs() * math.gcd(*multiples) == torch.tensor(multiples)).all())


def test_the_largest_step_is_found():
    """4 and 10 are 2 and 5 steps of 2; each row has its own."""
    scale = torch.tensor([[4.0, -10.0, 6.0], [3.0, 3.0, -3.0], [0.5, 7.5, 1.0]])

    assert common_step(scale).tolist() == [2.0, 3.0, 0.5]


@pytest.mark.parametrize(
    "row",
    [[1.0, 16.0], [1.0, 1.5, 1.25, 4.0], [1.0, 1.001], [0.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]],
    ids=["too many steps", "parts of a step", "close", "zero", "nan", "infinite"],
)
def test_other_scales_are_refused_with_their_row(row):
    """A checkpoint that says so of scales that are not would be computed wrongly."""
    good = torch.ones(2, len(row))

    with pytest.raises(SpecError, match="scales of row 2 are not multiples of one step, from 1 to 15"):
        common_step(torch.cat((good, torch.tensor([row]))))
