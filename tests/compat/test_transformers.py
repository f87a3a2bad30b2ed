"""The private parts of transformers that we touch are as we take them to be."""

import inspect

import pytest
import torch
from transformers.quantizers import auto
from transformers.quantizers.auto import AutoHfQuantizer

from optimum_qvlm import QVLMConfig
from optimum_qvlm.compat.transformers import loaded_keys, saved_keys, take_loading_attributes
from tests.tiny_models import tiny_llama, tiny_llava

pytestmark = pytest.mark.integration


def test_the_classes_with_loading_attributes_are_a_tuple_that_is_read_at_each_load():
    before = auto.LOADING_ATTRIBUTES_CONFIG_TYPES

    take_loading_attributes(QVLMConfig)

    assert isinstance(before, tuple) and before.count(QVLMConfig) == 1
    assert before == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    source = inspect.getsource(AutoHfQuantizer.merge_quantization_configs)
    assert source.count("LOADING_ATTRIBUTES_CONFIG_TYPES") == 2 and "get_loading_attributes()" in source


def test_loading_attributes_are_set_on_the_configuration_of_the_checkpoint():
    merged = AutoHfQuantizer.merge_quantization_configs(QVLMConfig("w4a4").to_dict(), QVLMConfig(decode_tokens=0))

    assert merged.exact_decode is True
    assert merged.scheme == "w4a4"


@pytest.mark.parametrize("build", [tiny_llama, tiny_llava], ids=["llama", "llava"])
def test_names_lead_to_files_and_back(build):
    model = build()
    state = model.state_dict()

    names = saved_keys(model, state)

    keys = loaded_keys(model, names, state)
    assert [keys[name] for name in names] == [(key, False) for key in state]


def test_a_tensor_without_place_keeps_a_name_that_the_state_lacks():
    state = tiny_llama().state_dict()

    keys = loaded_keys(tiny_llama(), ["model.layers.7.mlp.up_proj.weight", "lm_head.weight"], state)

    assert keys["lm_head.weight"][0] in state
    assert keys["model.layers.7.mlp.up_proj.weight"][0] not in state
    assert torch.is_tensor(state["lm_head.weight"])
