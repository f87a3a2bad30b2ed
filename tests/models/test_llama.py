"""Text models: one chain of decoder layers."""

import pytest
import torch
from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.llama import LlamaAdapter
from tests.tiny_models import llama_batch, tiny_llama


@pytest.mark.parametrize("layers", [1, 2, 11])
def test_the_decoder_is_the_only_part(layers):
    (part,) = LlamaAdapter(tiny_llama(num_hidden_layers=layers)).parts()

    assert (part.name, part.vision) == ("language", False)
    assert part.layers == tuple(f"model.layers.{number}" for number in range(layers))


def test_sites_are_those_of_a_decoder_layer():
    sites = LlamaAdapter(tiny_llama()).sites("model.layers.1")

    leaves = [tuple(path.removeprefix("model.layers.1.") for path in site) for site in sites]
    assert leaves == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]


def test_every_layer_runs_in_turn():
    model = tiny_llama(num_hidden_layers=3)
    (part,) = LlamaAdapter(model).parts()
    called: list[str] = []
    for path in part.layers:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))

    with torch.no_grad():
        model(**llama_batch())

    assert called == list(part.layers)


def test_it_has_no_image_tokens():
    assert LlamaAdapter(tiny_llama()).image_tokens() == ()


def test_a_model_without_such_layers_is_refused():
    model = tiny_llama()
    model.model.layers = nn.Linear(2, 2)

    with pytest.raises(UnsupportedModelError, match=r"model\.layers of LlamaForCausalLM is not a list of layers"):
        LlamaAdapter(model).parts()
