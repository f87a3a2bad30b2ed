"""Which backend computes with a weight, and what one must offer."""

from dataclasses import dataclass, replace

import pytest
import torch

from optimum_qvlm.kernels import PACKED, LinearGrid, dispatch
from optimum_qvlm.kernels.cpu import table
from optimum_qvlm.spec import WeightSpec

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class NewSpec(WeightSpec):
    """A grid with a property that no backend was written for."""

    inside_out: bool = False


@pytest.mark.parametrize("bits", [4, 8])
def test_a_property_that_no_backend_knows_is_computed_by_the_definition(bits):
    """A backend that passes over a property of the grid would give other numbers, and nothing would fail."""
    usual = LinearGrid(in_features=64, out_features=64, weight=NewSpec(bits=bits), scale_dtype=torch.float32)
    unknown = replace(usual, weight=NewSpec(bits=bits, inside_out=True))

    assert dispatch.choose_layout(usual, CPU) == table.LAYOUT
    assert dispatch.choose_layout(unknown, CPU) == PACKED


@pytest.mark.parametrize("grid", [WeightSpec(bits=4, group=32, symmetric=False), WeightSpec(bits=4, two_level=True)])
def test_properties_that_backends_know_are_theirs(grid):
    assert dispatch.choose_layout(LinearGrid(in_features=64, out_features=64, weight=grid), CPU) == table.LAYOUT
