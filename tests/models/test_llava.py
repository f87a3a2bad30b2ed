"""LLaVA: tower, projector, decoder, in the order in which they run."""

import pytest
import torch
from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.llava import LlavaAdapter
from tests.tiny_models import IMAGE_TOKEN, llava_batch, tiny_llava


@pytest.mark.parametrize("tower_layers, text_layers", [(2, 1), (3, 2)])
def test_parts_come_in_execution_order(tower_layers, text_layers):
    model = tiny_llava(vision={"num_hidden_layers": tower_layers}, text={"num_hidden_layers": text_layers})

    vision, projector, language = LlavaAdapter(model).parts()

    assert [part.name for part in (vision, projector, language)] == ["vision", "projector", "language"]
    assert [part.vision for part in (vision, projector, language)] == [True, True, False]
    assert [len(part.layers) for part in (vision, projector, language)] == [tower_layers - 1, 1, text_layers]


@pytest.mark.parametrize(
    "chosen, read",
    [(-1, 4), (-2, 3), (-4, 1), (4, 4), (2, 2), ([-2, -4], 3), ([1, 3], 3), (0, 1)],
)
def test_layers_behind_the_features_that_are_selected_are_unused(chosen, read):
    """`vision_feature_layer` counts hidden states, of which there is one more than layers."""
    vision = LlavaAdapter(tiny_llava(vision={"num_hidden_layers": 4}, vision_feature_layer=chosen)).parts()[0]

    paths = tuple(f"model.vision_tower.encoder.layers.{number}" for number in range(4))
    assert (vision.layers, vision.unused) == (paths[:read], paths[read:])


def test_every_layer_of_every_part_runs_in_turn():
    """The parts are chains: what is named must be called, once per forward and in this order."""
    model = tiny_llava()
    vision, *others = LlavaAdapter(model).parts()
    named = [*vision.layers, *vision.unused, *(layer for part in others for layer in part.layers)]
    called: list[str] = []
    for path in named:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))

    with torch.no_grad():
        model(**llava_batch())

    assert called == named


def test_all_linears_but_the_head_lie_in_a_site():
    """What no site holds would stay in full precision unseen."""
    model = tiny_llava()
    adapter = LlavaAdapter(model)

    actual = [
        path
        for part in adapter.parts()
        for layer in (*part.layers, *part.unused)
        for site in adapter.sites(layer)
        for path in site
    ]

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(actual) == len(set(actual))
    assert {*actual, "lm_head"} == set(linears)


def test_members_of_a_site_read_the_same_tensor():
    """On a real forward, which is what calibration checks as well."""
    model = tiny_llava()
    adapter = LlavaAdapter(model)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))

    with torch.no_grad():
        model(**llava_batch())

    sites = [site for part in adapter.parts() for layer in part.layers for site in adapter.sites(layer)]
    assert any(len(site) > 1 for site in sites)
    for first, *others in sites:
        assert all(torch.equal(seen[first], seen[other]) for other in others)


@pytest.mark.parametrize("image_token", [IMAGE_TOKEN, 7])
def test_the_image_token_is_that_of_the_configuration(image_token):
    assert LlavaAdapter(tiny_llava(image_token_id=image_token)).image_tokens() == (image_token,)


def test_towers_of_older_releases_are_found():
    """transformers had one more module around the encoder."""
    model = tiny_llava()
    tower = nn.Module()
    tower.vision_model = model.model.vision_tower
    model.model.vision_tower = tower

    vision = LlavaAdapter(model).parts()[0]

    assert vision.layers[0] == "model.vision_tower.vision_model.encoder.layers.0"


def test_a_tower_of_another_shape_is_refused():
    model = tiny_llava()
    model.model.vision_tower = nn.Linear(2, 2)

    with pytest.raises(
        UnsupportedModelError, match=r"model\.vision_tower of LlavaForConditionalGeneration holds no list of layers"
    ):
        LlavaAdapter(model).parts()
