"""Qwen2.5-VL and Qwen3-VL: mergers, and features that are added between decoder layers."""

import pytest
import torch

from optimum_qvlm.models.qwen_vl import Qwen3VLAdapter, Qwen25VLAdapter, add_deepstack
from tests.tiny_families import FAMILIES, VIDEO_TOKEN
from tests.tiny_models import IMAGE_TOKEN


def hidden_and_arguments(layers=2):
    """Two rows of three tokens, the second of each an image token."""
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[False, True, False]] * 2)
    features = [torch.randn(2, 4, generator=generator) for _ in range(layers)]
    hidden = torch.randn(2, 3, 4, generator=generator)
    return hidden, {"visual_pos_masks": places, "deepstack_visual_embeds": features}


def test_parts_of_qwen2_5_vl():
    parts = Qwen25VLAdapter(FAMILIES["qwen2_5_vl"].build()).parts()

    assert [(part.name, len(part.layers), part.vision) for part in parts] == [
        ("vision", 3, True),
        ("projector", 1, True),
        ("language", 2, False),
    ]


def test_parts_of_qwen3_vl_have_a_merger_for_each_deepstack_feature():
    parts = Qwen3VLAdapter(FAMILIES["qwen3_vl"].build()).parts()

    assert [part.name for part in parts] == ["vision", "deepstack 0", "deepstack 1", "projector", "language"]
    assert [part.join is not None for part in parts] == [False, False, False, False, True]
    assert len({part.name for part in parts}) == len(parts)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_images_and_videos_have_tokens(name):
    """Neither may be cut from a sample that is too long."""
    adapter = Qwen25VLAdapter(FAMILIES[name].build())

    assert adapter.image_tokens() == (IMAGE_TOKEN, VIDEO_TOKEN)


def test_all_linears_but_the_head_lie_in_a_part():
    model = FAMILIES["qwen3_vl"].build()
    adapter = Qwen3VLAdapter(model)

    actual = {
        path for part in adapter.parts() for layer in part.layers for site in adapter.sites(layer) for path in site
    }

    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - actual == {"lm_head"}


@pytest.mark.parametrize("number", [1, 2])
def test_deepstack_features_are_added_to_image_tokens_alone(number):
    """As the model itself adds them, after decoder layer `number` - 1."""
    hidden, arguments = hidden_and_arguments()
    model = FAMILIES["qwen3_vl"].build()
    features = arguments["deepstack_visual_embeds"][number - 1]
    expected = model.model.language_model._deepstack_process(hidden, arguments["visual_pos_masks"], features)

    actual = add_deepstack(number, hidden, arguments)

    assert torch.equal(actual, expected)
    assert torch.equal(actual[:, [0, 2]], hidden[:, [0, 2]])


@pytest.mark.parametrize("arguments", [{}, {"deepstack_visual_embeds": None, "visual_pos_masks": None}])
def test_text_without_images_passes_unchanged(arguments):
    hidden, _ = hidden_and_arguments()

    assert torch.equal(add_deepstack(1, hidden, arguments), hidden)


def test_later_layers_get_no_features():
    hidden, arguments = hidden_and_arguments()

    assert torch.equal(add_deepstack(3, hidden, arguments), hidden)


def test_what_the_layer_before_returned_is_left_alone():
    """It is the wanted output of that layer, which errors are measured against."""
    hidden, arguments = hidden_and_arguments()
    before = hidden.clone()

    add_deepstack(1, hidden, arguments)

    assert torch.equal(hidden, before)
