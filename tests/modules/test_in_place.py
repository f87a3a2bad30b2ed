"""What a linear returns may be changed in place, as what `nn.Linear` returns: some adapters add to it so."""

import pytest
import torch

from optimum_qvlm.modules.fused import fuse
from tests.modules.test_bound import ROWS, inputs, make_linear


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("follows", [False, True], ids=["first layer", "later layer"])
@pytest.mark.parametrize("prepared", [False, True], ids=["packed", "prepared"])
def test_outputs_are_added_to_in_place_in_training(prepared, follows, tokens, fused, compiled):
    """The gradients are those of a sum that is a tensor of its own."""
    torch.compiler.reset()  # otherwise the cases count as recompilations of one function
    linears = [make_linear(bias=False, seed=seed) for seed in (0, 1)]
    if not prepared:
        linears = [linear.pack() for linear in linears]
    if fused:
        linears = fuse(linears)
    x = inputs(tokens)[:1].requires_grad_(follows)
    shift = torch.full((ROWS,), 0.5, requires_grad=True)

    def in_place(x):
        outputs = [linear(x) for linear in linears]
        for output in outputs:
            output += shift
        return torch.cat(outputs)

    result = (torch.compile(in_place, fullgraph=True, backend="aot_eager") if compiled else in_place)(x)
    result.square().sum().backward()

    expected = torch.cat([linear(x.detach()) + 0.5 for linear in linears])
    assert torch.equal(result.detach(), expected)
    assert torch.allclose(shift.grad, 2 * expected.sum(dim=(0, 1)), rtol=1e-5, atol=1e-4)
    assert (x.grad is not None) is follows
