"""A dry run finds what a real run would refuse, says what it would do, and leaves nothing behind."""

import json

import pytest
import torch

from optimum_qvlm import QVLMConfig, dry_run
from optimum_qvlm.errors import CalibrationError, CheckpointError, ConfigError, DataError, SpecError
from tests.configs import make_config
from tests.jobs import contents, load, make_batch, quantize
from tests.tiny_families import FAMILIES
from tests.tiny_models import llama_batch, llava_batch, tiny_llama


def settings_of(folder, **settings):
    return {"dataset": [make_batch(folder, seed=0, padding=2), make_batch(folder, seed=1)]} | settings


def tried(folder, scheme="w4a8", *, into=None, options=None, **settings):
    """A dry run of the tiny model in `folder`."""
    return dry_run(folder, make_config(scheme, **settings_of(folder, **settings)), folder=into, **(options or {}))


@pytest.mark.parametrize("method", ["qvlm", "rtn"])
@pytest.mark.parametrize("family", ["llava", "llama"])
def test_it_shows_what_the_real_run_then_does(family, method, request):
    """Name by name: effective bits, group, site."""
    folder = request.getfixturevalue(f"{family}_folder")
    settings = {"method": method, "overrides": {"layers.0.mlp.down_proj": "w6a6", "lm_head": "w8a8"}}

    shown = tried(folder, **settings)

    model = quantize(folder, **settings)
    record = model.hf_quantizer.config.record
    assert {row.name for row in shown.modules} == set(record.modules)
    for row in shown.modules:
        entry = record.modules[row.name]
        assert (row.weight, row.site) == (entry.weight, entry.site)
        assert row.activation == entry.activation
    assert shown.kept == tuple(model.hf_quantizer.report["kept_in_full_precision"])
    blocks = [row.block for row in shown.modules if row.block is not None]
    assert sorted(set(blocks)) == list(range(1, max(blocks) + 1))
    sizes = model.hf_quantizer.report["bytes"]
    assert shown.bytes_before == sizes["before"]
    equalizers = sum(4 * entry.in_features for entry in record.modules.values() if entry.format.equalized)
    assert sizes["after"] - equalizers <= shown.bytes_after <= sizes["after"] + equalizers


def test_bytes_of_the_modules_add_up(llava_folder):
    """What the modules save is what the model saves."""
    shown = tried(llava_folder)

    saved = sum(row.bytes_before - row.bytes_after for row in shown.modules)
    assert shown.bytes_before - shown.bytes_after == saved
    assert all(0 < row.bytes_after < row.bytes_before for row in shown.modules)


@pytest.mark.parametrize("failing", [False, True], ids=["whole", "refused"])
def test_nothing_is_left_on_disk(llava_folder, tmp_path, failing):
    before = contents(llava_folder)
    if failing:
        with pytest.raises(DataError, match="is empty"):
            tried(llava_folder, into=tmp_path, dataset=[])
    else:
        assert tried(llava_folder, into=tmp_path).saved_bytes > 0

    assert list(tmp_path.iterdir()) == []
    assert contents(llava_folder) == before


def test_the_configuration_can_be_used_for_the_real_run_afterwards(llava_folder):
    """It still has its data, and does not say that it was rehearsed."""
    config = make_config(**settings_of(llava_folder))

    dry_run(llava_folder, config)
    model = load(llava_folder, quantization_config=config)

    assert config == QVLMConfig() and len(config.dataset) == 2
    assert model.hf_quantizer.dry_run is None
    assert len(model.hf_quantizer.report["layers"]) == 5


def test_values_are_plain_json(llava_folder):
    """For programs that decide by them."""
    values = tried(llava_folder).to_dict()

    assert json.loads(json.dumps(values, allow_nan=False))["samples"] == 4
    assert {"seconds", "answer_seconds", "host_bytes", "device_bytes"} == set(values["cost"])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"group_size": 48}, SpecError, "does not divide in_features=64"),
        ({"modules_to_not_convert": ["layer.0"]}, ConfigError, "matches no linear of the model"),
        ({"dataset": "nosuch"}, DataError, "is not a preset"),
        ({"dataset": [{"question": "?"}]}, DataError, "has an image"),
        ({"dataset": [llama_batch()]}, DataError, "no calibration input holds an image token"),
        ({"options": {"device_map": {"": "disk"}}}, ConfigError, "offloaded to disk"),
        ({"options": {"device_map": "auto", "max_memory": {"cpu": "1kB"}}}, ConfigError, "offloaded to disk"),
    ],
    ids=["group", "pattern", "preset", "no image", "no image token", "disk", "memory"],
)
def test_what_a_real_run_refuses_is_refused_with_the_same_words(llava_folder, changes, error, message):
    with pytest.raises(error, match=message) as wanted:
        quantize(llava_folder, **changes)

    with pytest.raises(error, match=message) as found:
        tried(llava_folder, **changes)

    assert str(found.value) == str(wanted.value)


def test_weights_and_samples_that_mean_nothing_are_refused(tmp_path, llava_folder):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    broken = llava_batch()
    broken["pixel_values"][0] = float("inf")

    with pytest.raises(CalibrationError, match=r"layers.1.mlp.up_proj.weight holds 1 NaN"):
        tried(tmp_path)
    with pytest.raises(CalibrationError, match="NaN or infinite activations"):
        tried(llava_folder, dataset=[broken])


def test_a_place_that_cannot_be_written_is_refused(llama_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder can be made in .*; choose another place"):
        tried(llama_folder, into=tmp_path / "missing")


def test_text_for_people(llava_folder):
    """One line for each linear, then what it would cost."""
    shown = tried(llava_folder)

    lines = str(shown).splitlines()
    assert len([line for line in lines if " w8a8 " in line or " w4a8 " in line]) == len(shown.modules)
    assert "kept     language_model.lm_head" in lines
    assert "6 in layers that nothing reads" in str(shown)
    assert lines[-1].startswith("estimate: ")


@pytest.mark.integration
def test_conversations_are_rendered_and_missing_answers_estimated(bundled_folder):
    """Of the missing answers one is written, the others are counted."""
    records = [{"image": record["image"], "question": "What is it?"} for record in images(3)]

    shown = dry_run(bundled_folder, QVLMConfig("w4a16", dataset=records, batch_size=2))

    assert (shown.samples, shown.missing_answers) == (3, 3)
    assert 0 < shown.cost.answer_seconds < shown.cost.seconds
    assert set(shown.chain) == {"vision", "projector", "language"}
    assert max(shown.chain.values()) < 1e-3


def images(count):
    from PIL import Image

    return [{"image": Image.new("RGB", (32, 32), colour)} for colour in ("red", "green", "blue")[:count]]


@pytest.mark.integration
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_can_be_tried(name, tmp_path):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "full")

    shown = dry_run(tmp_path / "full", QVLMConfig("w4a4", dataset=[family.batch(), family.batch(seed=1)]))

    assert len(shown.kept) == 1
    assert max(shown.chain.values()) < 1e-6
