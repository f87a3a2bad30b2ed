"""From a model to the adapter of its family."""

from types import SimpleNamespace

import pytest
from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.discovery import DiscoveredAdapter
from optimum_qvlm.models.llama import LlamaAdapter
from optimum_qvlm.models.llava import LlavaAdapter
from optimum_qvlm.models.registry import ADAPTERS, adapter_for, register_adapter
from tests.tiny_families import FAMILIES
from tests.tiny_models import tiny_llama, tiny_llava


@pytest.mark.parametrize("build, expected", [(tiny_llava, LlavaAdapter), (tiny_llama, LlamaAdapter)])
def test_the_family_decides(build, expected):
    model = build()

    adapter = adapter_for(model)

    assert type(adapter) is expected
    assert adapter.model is model


@pytest.mark.parametrize("model_type", ["mamba", "", None])
def test_other_families_are_refused_with_those_that_are_known(model_type):
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type=model_type)

    message = rf"model_type {model_type!r} \(Linear\) has no adapter.*: it is no model of .* Known: .*llama, llava.*"
    with pytest.raises(UnsupportedModelError, match=message):
        adapter_for(model)


def test_every_known_family_is_tested():
    """A model of each is built, fed and quantized in the tests."""
    assert set(ADAPTERS) == set(FAMILIES)


def test_a_registered_adapter_is_used(monkeypatch):
    monkeypatch.setattr("optimum_qvlm.models.registry.ADAPTERS", dict(ADAPTERS))

    class Mine(LlamaAdapter):
        pass

    register_adapter("llama", Mine)

    assert type(adapter_for(tiny_llama())) is Mine


@pytest.mark.parametrize("wrong", [nn.Linear, LlamaAdapter(tiny_llama()), None], ids=["class", "instance", "none"])
def test_only_adapters_can_be_registered(wrong):
    with pytest.raises(UnsupportedModelError, match=r"the adapter for 'x' must be a subclass of optimum_qvlm\.Adapter"):
        register_adapter("x", wrong)

    assert "x" not in ADAPTERS


def test_a_family_without_adapter_is_looked_at():
    model = tiny_llama()
    model.config.model_type = "llama_of_tomorrow"

    assert type(adapter_for(model)) is DiscoveredAdapter
