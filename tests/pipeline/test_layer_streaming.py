"""Which modules move to the device together, when a model is run one layer at a time."""

import pytest
import torch

from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.layer_streaming import holders, resident, streamed, units
from tests.plans import CPU
from tests.tiny_models import tiny_llama, tiny_llava


@pytest.fixture(params=["llava", "llama", "tied llama"])
def model(request):
    if request.param == "llava":
        return tiny_llava()
    return tiny_llama(tie_word_embeddings=request.param == "tied llama")


def layers_of(model):
    return {layer for part in adapter_for(model).parts() for layer in part.layers}


def paths_of(model, modules):
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in modules]


def test_every_layer_is_a_unit(model):
    assert layers_of(model) <= set(paths_of(model, units(model, layers_of(model))))


def test_units_do_not_contain_each_other(model):
    """One would be taken from the device while the other still runs."""
    paths = paths_of(model, units(model, layers_of(model)))

    assert len(paths) == len(set(paths))
    assert not [(a, b) for a in paths for b in paths if b.startswith(f"{a}.")]


def test_every_tensor_is_in_one_unit_or_held_for_the_whole_time(model):
    """A tensor that is nowhere would stay on the CPU and stop the forward."""
    layers = layers_of(model)
    modules = [module for unit in units(model, layers) for module in unit.modules()]
    moved = {id(t) for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    held = {
        id(tensor)
        for holder in holders(model, layers)
        for tensor in (*holder.parameters(recurse=False), *holder.buffers(recurse=False))
    }

    assert moved | held == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert not moved & held


def testholders_are_what_lies_above_layers(model):
    layers = layers_of(model)
    above = {name for name, _ in model.named_modules() if any(la.startswith(f"{name}.") for la in layers)} | {""}

    assert set(paths_of(model, holders(model, layers))) == above


def test_without_layers_every_child_is_a_unit():
    model = tiny_llama()

    assert paths_of(model, units(model, set())) == ["model", "lm_head"]
    assert paths_of(model, holders(model, set())) == []


def test_on_the_cpu_nothing_is_hooked_or_moved(model):
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    with streamed(model, layers_of(model), CPU):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        for layer in layers_of(model):
            with resident(model, layer, CPU):
                pass

    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_tied_weights_stay_tied():
    model = tiny_llama(tie_word_embeddings=True)

    with streamed(model, layers_of(model), CPU), resident(model, "lm_head", CPU):
        pass

    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_path_that_leads_nowhere_is_refused_on_a_device():
    with pytest.raises(AttributeError, match="nowhere"), resident(tiny_llama(), "nowhere", torch.device("meta")):
        pass
