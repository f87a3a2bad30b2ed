"""Idefics3 and SmolVLM: LLaVA's shape under other names."""

import pytest

from optimum_qvlm.models.idefics3 import Idefics3Adapter
from tests.tiny_families import FAMILIES
from tests.tiny_models import IMAGE_TOKEN


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_parts_are_tower_connector_and_text_model(name):
    adapter = Idefics3Adapter(FAMILIES[name].build())

    parts = {part.name: part for part in adapter.parts()}

    assert list(parts) == ["vision", "projector", "language"]
    assert parts["vision"].layers == tuple(f"model.vision_model.encoder.layers.{n}" for n in range(2))
    assert parts["projector"].layers == ("model.connector",)
    assert parts["language"].layers == tuple(f"model.text_model.layers.{n}" for n in range(2))
    assert adapter.image_tokens() == (IMAGE_TOKEN,)
