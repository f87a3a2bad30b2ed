"""Gradients through layers that are run again, against those of an ordinary backward pass."""

import pytest
import torch
from torch import nn

from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.layer_recomputation import frozen, recomputed
from tests.plans import CPU
from tests.tiny_models import llama_batch, llava_batch, tiny_llama, tiny_llava

CASES = {"llava": (tiny_llava, llava_batch), "llama": (tiny_llama, llama_batch)}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    make_model, make_batch = request.param
    return make_model(), make_batch(padding=2)


def layers_of(model):
    return [layer for part in adapter_for(model).parts() for layer in part.layers]


def learn(model, batch, names):
    """Gradients of some parameters for a scalar of the logits."""
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    model.zero_grad()
    model(**batch, use_cache=False).logits.float().square().mean().backward()
    return {name: model.get_parameter(name).grad.clone() for name in names}


def weights_of(model):
    """One weight of each layer that runs, and one outside of all layers."""
    used = layers_of(model)
    if "model.vision_tower.encoder.layers.2" in used:
        used.remove("model.vision_tower.encoder.layers.2")  # the features come from the layer before
    firsts = [next(name for name, _ in model.get_submodule(path).named_parameters()) for path in used]
    return [*(f"{path}.{first}" for path, first in zip(used, firsts, strict=True)), "lm_head.weight"]


def test_gradients_are_those_of_an_ordinary_backward_pass(case):
    """Through everything that happens between layers too: where image features enter the text, norms, the head."""
    model, batch = case
    names = weights_of(model)
    with frozen(model):
        wanted = learn(model, batch, names)

    with frozen(model), recomputed(model, layers_of(model), CPU):
        found = learn(model, batch, names)

    assert all(torch.equal(found[name], wanted[name]) for name in names)
    assert all(bool(gradient.abs().sum() > 0) for gradient in found.values())


def test_only_the_first_layer_learns_and_all_later_ones_pass_its_gradient(case):
    model, batch = case
    name = weights_of(model)[0]
    with frozen(model):
        wanted = learn(model, batch, [name])[name]

    with frozen(model), recomputed(model, layers_of(model), CPU):
        found = learn(model, batch, [name])[name]
        others = [n for n, parameter in model.named_parameters() if parameter.grad is not None and n != name]

    assert torch.equal(found, wanted)
    assert others == []


def test_outputs_do_not_change(case):
    model, batch = case
    wanted = model(**batch, use_cache=False).logits

    with frozen(model), recomputed(model, layers_of(model), CPU):
        model.get_parameter(weights_of(model)[0]).requires_grad_(True)
        found = model(**batch, use_cache=False).logits

    assert found.requires_grad and torch.equal(found, wanted)


def test_no_layer_keeps_what_it_computes_inside(case):
    """What waits for the backward pass is what enters the layers, not the much larger rest."""
    model, batch = case
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    def run():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(**batch, use_cache=False)
        return sum(kept)

    with frozen(model):
        model.get_parameter(weights_of(model)[0]).requires_grad_(True)
        ordinary = run()
        with recomputed(model, layers_of(model), CPU):
            assert run() < ordinary / 10


def test_without_gradients_nothing_is_noted(case):
    model, batch = case

    with frozen(model), recomputed(model, layers_of(model), CPU), torch.no_grad():
        assert model(**batch, use_cache=False).logits.grad_fn is None


def test_the_model_is_left_as_it_was(case):
    model, _ = case
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    with pytest.raises(RuntimeError, match="stop"), frozen(model), recomputed(model, layers_of(model), CPU):
        raise RuntimeError("stop")

    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_forward_of_the_module_s_own_is_given_back():
    """Other libraries replace forwards of instances as well."""
    model = tiny_llama()
    layer = model.get_submodule(layers_of(model)[0])
    own = layer.forward
    layer.forward = own

    with recomputed(model, layers_of(model), CPU):
        assert layer.forward is not own

    assert layer.forward is own


class TwoOutputs(nn.Module):
    """A layer with a tensor, nothing and a number of its own among its outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, hidden_states, *, shift=None):
        return hidden_states * self.weight + (0 if shift is None else shift), None, 7


@pytest.mark.parametrize("input_learns", [False, True])
@pytest.mark.parametrize("shift_learns", [False, True])
def test_gradients_reach_every_tensor_argument(input_learns, shift_learns):
    """Hidden states and keyword arguments alike, or none but the layer's own parameters."""
    model = nn.Module()
    model.layers = nn.ModuleList([TwoOutputs()])
    x, shift = (torch.ones(2, requires_grad=learns) for learns in (input_learns, shift_learns))

    with recomputed(model, ["layers.0"], CPU):
        output, nothing, number = model.layers[0](x, shift=shift)
        output.sum().backward()

    assert (nothing, number) == (None, 7)
    assert model.layers[0].weight.grad.tolist() == [1.0, 1.0]
    assert (x.grad is not None) == input_learns and (shift.grad is not None) == shift_learns
    if input_learns:
        assert x.grad.tolist() == [2.0, 3.0]
