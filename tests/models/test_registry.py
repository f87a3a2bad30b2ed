"""From a model to the adapter of its family."""

from types import SimpleNamespace

import pytest
from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.llama import LlamaAdapter
from optimum_qvlm.models.llava import LlavaAdapter
from optimum_qvlm.models.registry import adapter_for
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
