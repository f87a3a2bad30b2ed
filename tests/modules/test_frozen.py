"""Packed integers refuse to be trained, by the name of their module, however they are asked."""

import copy
import pickle

import pytest
import torch
from torch import nn

from optimum_qvlm.errors import ReadOnlyError
from optimum_qvlm.modules.fused import fuse
from tests.modules.test_bound import inputs, make_linear


def named(linear, path="layers.3.up_proj"):
    linear.path = path
    return linear


def given_a_state(linear):
    linear.load_state_dict(linear.state_dict(), assign=True)
    return linear


WAYS = {
    "as it is": lambda linear: linear,
    "copied": copy.deepcopy,
    "pickled": lambda linear: pickle.loads(pickle.dumps(linear)),
    "cast": lambda linear: linear.to(torch.bfloat16),
    "packed": lambda linear: linear.pack(),
    "given a state": given_a_state,
    "fused": lambda linear: fuse([linear, named(make_linear(seed=1), "layers.3.gate_proj")])[0],
}


@pytest.mark.parametrize("way", list(WAYS))
def test_whoever_asks_for_gradients_is_told_which_linear(way):
    linear = WAYS[way](named(make_linear()))
    holder = nn.ModuleDict({"inner": linear})

    packed = next(parameter for parameter in linear.parameters() if not parameter.is_floating_point())

    for ask in (linear.requires_grad_, holder.requires_grad_, packed.requires_grad_):
        with pytest.raises(ReadOnlyError, match=r"layers\.3\.up_proj.*\(quantized, \d+x128\) cannot be trained"):
            ask(True)

    assert holder.requires_grad_(False) is holder
    assert packed.requires_grad_(False) is packed
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_a_linear_in_no_model_is_told_by_its_sizes():
    with pytest.raises(ReadOnlyError, match="a quantized linear of 48x128 cannot be trained"):
        make_linear().requires_grad_()


def test_the_bias_alone_can_be_trained():
    linear = make_linear()
    linear.bias.requires_grad_()

    linear(inputs()).sum().backward()

    assert linear.bias.grad is not None


def test_states_hold_no_function_of_ours():
    """They are written and read without this package."""
    tensors = make_linear().state_dict()

    assert all(not vars(tensor) for tensor in tensors.values())


def test_a_parameter_does_not_keep_its_module():
    """A cycle would keep the memory of a replaced linear until the collector runs."""
    linear = make_linear()
    packed = linear.weight_packed
    del linear

    with pytest.raises(ReadOnlyError, match="a quantized linear cannot be trained"):
        packed.requires_grad_()
