"""Presets and the record of what a calibration used."""

import json

import pytest

from optimum_qvlm.data.recipe import PRESETS, Recipe, find_preset
from optimum_qvlm.errors import DataError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_found_by_name(name):
    preset = find_preset(name)

    assert preset is PRESETS[name]
    assert preset.path.count("/") == 1 and preset.question and preset.answer


@pytest.mark.parametrize("name", ["", "ScienceQA", "coco", "samples.json"])
def test_other_names_are_refused_with_those_that_are_known(name):
    """People also write a file's name here; the message says what to pass for own data."""
    message = f"dataset {name!r} is not a preset; presets: chartqa, scienceqa, textvqa. .* list of dicts with image"
    with pytest.raises(DataError, match=message):
        find_preset(name)


def test_a_recipe_is_plain_json():
    """It is saved in the checkpoint, without the data."""
    recipe = Recipe(source="packaged", samples=64, seed=0, fingerprint="ab" * 32)

    assert json.loads(json.dumps(recipe.to_dict())) == {
        "source": "packaged",
        "samples": 64,
        "seed": 0,
        "fingerprint": "ab" * 32,
    }
