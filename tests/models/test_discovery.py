"""Families without an adapter, but with the usual parts in the usual places."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.discovery import DiscoveredAdapter
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline import checks
from optimum_qvlm.pipeline.capture import Tracer
from tests.plans import CPU, forward_of, plan_for
from tests.tiny_families import FAMILIES, qwen2_vl, qwen_batch, vipllava
from tests.tiny_models import llama_batch, llama_config, llava_batch, tiny_llava

UNKNOWN_TEXT = ("gemma2", "granite", "olmo2", "phi3", "smollm3", "starcoder2", "glm4")


def chain_of(model, batch):
    """Largest difference of the discovered chains to the real forward."""
    plan = plan_for(model, adapter=DiscoveredAdapter(model))
    captured = Tracer(model, forward_of(model), plan.parts, CPU).capture([batch])
    for part in plan.parts:
        for number, layer in enumerate(part.layers):
            checks.require_shared_inputs(model, layer, captured[part.name][0], number, CPU)
    return max(checks.require_chain(model, part, captured[part.name][0], CPU) for part in plan.parts)


def unknown_text(model_type):
    """A small model of a family that has no adapter."""
    values = llama_config().to_diff_dict() | {"model_type": model_type, "head_dim": 16}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen3_vl"}))
def test_the_parts_of_known_families_are_found_without_their_adapters(name):
    """So the search finds what people wrote down."""
    model = FAMILIES[name].build()

    assert DiscoveredAdapter(model).parts() == adapter_for(model).parts()


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen3_vl"}))
def test_found_chains_reproduce_the_forward(name):
    family = FAMILIES[name]

    assert chain_of(family.build(), family.batch()) < 1e-6


@pytest.mark.parametrize("model_type", UNKNOWN_TEXT)
def test_unknown_text_models_are_found_and_verified(model_type):
    model = unknown_text(model_type)

    assert type(adapter_for(model)) is DiscoveredAdapter
    assert chain_of(model, llama_batch(padding=2)) < 1e-6


@pytest.mark.parametrize("config, batch", [(qwen2_vl, qwen_batch), (vipllava, llava_batch)])
def test_unknown_vision_language_models_are_found_and_verified(config, batch):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config()).eval()

    assert type(adapter_for(model)) is DiscoveredAdapter
    assert [part.name for part in adapter_for(model).parts()] == ["vision", "projector", "language"]
    assert chain_of(model, batch(padding=2)) < 1e-6


def test_a_model_that_does_more_between_its_layers_is_refused_by_the_check():
    """Qwen3-VL adds features there; found parts do not say so, and a wrong chain would calibrate on wrong inputs."""
    family = FAMILIES["qwen3_vl"]

    with pytest.raises(UnsupportedModelError, match=r"language layers, run one after the other, differ .* does more"):
        chain_of(family.build(), family.batch())


def test_several_projectors_are_parts_of_their_own():
    parts = DiscoveredAdapter(FAMILIES["qwen3_vl"].build()).parts()

    assert [part.name for part in parts] == ["vision", "projector", "projector 2", "projector 3", "language"]


def test_an_encoder_decoder_is_refused():
    model = tiny_llava()
    model.config.is_encoder_decoder = True

    with pytest.raises(UnsupportedModelError, match="encoder-decoder models have no single chain"):
        DiscoveredAdapter(model).parts()


def test_a_vision_model_whose_tower_is_not_found_is_refused():
    """Quantizing it as a text model would leave the tower in full precision unseen."""
    model = tiny_llava()
    model.model.eyes = model.model.vision_tower
    del model.model.vision_tower

    with pytest.raises(UnsupportedModelError, match="no vision tower is in one of the usual places"):
        DiscoveredAdapter(model).parts()


def test_a_decoder_that_holds_the_tower_is_refused(monkeypatch):
    """Its longest list of layers might be the tower's."""
    model = tiny_llava()
    monkeypatch.setattr(model, "get_decoder", lambda: model.model, raising=False)

    with pytest.raises(UnsupportedModelError, match=r"the decoder is not a module of its own beside the tower model\."):
        DiscoveredAdapter(model).parts()


def test_a_tower_may_have_the_beginning_of_the_decoders_name():
    """Paths are compared by component."""
    model = tiny_llava()
    model.model.vision_tower_text = model.model.language_model
    del model.model.language_model
    model.get_decoder = lambda: model.model.vision_tower_text

    vision, *_, language = DiscoveredAdapter(model).parts()

    assert vision.layers[0].startswith("model.vision_tower.")
    assert language.layers[0].startswith("model.vision_tower_text.")


def test_a_module_that_is_no_model_is_refused():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="x")

    with pytest.raises(UnsupportedModelError, match="it is no model of transformers"):
        DiscoveredAdapter(model).parts()


def test_the_refusal_says_what_an_adapter_must_give():
    """The way out for people who know their model."""
    model = tiny_llava()
    model.config.model_type = "seeing"
    model.model.vision_tower = nn.Linear(2, 2)

    with pytest.raises(
        UnsupportedModelError,
        match=r"'seeing' \(LlavaForConditionalGeneration\) has no adapter.*register_adapter.*names, in execution order",
    ):
        adapter_for(model)
