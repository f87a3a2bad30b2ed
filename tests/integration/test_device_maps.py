"""Device maps on the CPU: calibration under each kind, and reloading with offload."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_qvlm.errors import ConfigError
from tests.jobs import contents, load, logits, make_batch, quantize

pytestmark = pytest.mark.integration

PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
ON_CPU = dict.fromkeys(PARTS, "cpu")


@pytest.fixture(scope="module")
def incomplete_folder(llava_folder, tmp_path_factory) -> Path:
    """A checkpoint that lacks a weight, which is found out as soon as weights are loaded."""
    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("incomplete") / "model"))
    state = load_file(folder / "model.safetensors")
    del state["language_model.lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"": torch.device("cpu")}},
        {"device_map": torch.device("cpu")},
        {"device_map": ON_CPU},
        {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
        {"device_map": "auto"},
        {"device_map": "sequential", "max_memory": {"cpu": "1GB"}},
    ],
    ids=["name", "dict", "dict of device", "device", "many entries", "auto with limit", "auto", "sequential"],
)
def test_the_device_map_does_not_change_the_result(job, options):
    """Where a model is put is not what it is."""
    done = job("llava", "w4a8", symmetric=True)

    model = quantize(done.source, options=options)

    assert torch.equal(logits(model, done.batch), done.logits)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("device_map", ["auto", ON_CPU], ids=["auto", "many entries"])
def test_a_model_with_a_device_map_saves_the_same_weights(job, tmp_path, device_map):
    done = job("llava", "w4a8", symmetric=True)

    quantize(done.source, options={"device_map": device_map}).save_pretrained(tmp_path / "out")

    assert contents(tmp_path / "out")["model.safetensors"] == contents(done.folder)["model.safetensors"]


@pytest.mark.parametrize(
    "options, name",
    [
        ({"device_map": ON_CPU | {"lm_head": "disk"}}, "lm_head"),
        ({"device_map": {"": "disk"}}, "the model"),
        ({"device_map": "auto", "max_memory": {"cpu": "50KB"}}, "model.*"),
        ({"device_map": "sequential", "max_memory": {"cpu": "50KB"}}, "model.*"),
    ],
    ids=["dict", "whole", "auto", "sequential"],
)
def test_disk_is_refused_before_weights_are_loaded(incomplete_folder, tmp_path, options, name):
    """Hours later would be too late. Had weights been loaded, the missing one would be complained about."""
    with pytest.raises(ConfigError, match=f"{name} would be offloaded to disk, which calibration cannot do"):
        quantize(incomplete_folder, options=options | {"offload_folder": str(tmp_path)})


@pytest.mark.parametrize("family", ["llava", "llama"])
@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}],
    ids=["auto", "name", "dict"],
)
def test_a_saved_model_reloads_under_any_map(job, family, options):
    done = job(family, "w4a8", symmetric=True)

    assert torch.equal(logits(load(done.folder, **options), done.batch), done.logits)


def test_a_saved_model_reloads_part_by_part(job):
    done = job("llava", "w4a8", symmetric=True)

    assert torch.equal(logits(load(done.folder, device_map=ON_CPU), done.batch), done.logits)


@pytest.mark.parametrize("part", PARTS)
def test_a_saved_model_reloads_with_parts_on_disk(job, tmp_path, part):
    """Packed weights are parameters, so offloading moves them like any others."""
    done = job("llava", "w4a4", symmetric=False)

    model = load(done.folder, device_map=ON_CPU | {part: "disk"}, offload_folder=str(tmp_path))

    assert model.hf_device_map[part] == "disk"
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, done.batch), done.logits)


def test_a_saved_model_spills_to_disk_where_memory_ends(job, tmp_path):
    """The limit is below the size of the packed model."""
    done = job("llava", "w4a8", symmetric=True)

    model = load(done.folder, device_map="auto", max_memory={"cpu": "200KB"}, offload_folder=str(tmp_path))

    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(model, done.batch), done.logits)


def test_limits_are_meant_for_the_quantized_model(job):
    """It is for memories too small for full precision that people quantize."""
    done = job("llava", "w4a8", symmetric=True)
    full = sum(t.numel() * t.element_size() for t in load(done.source).state_dict().values())
    limit = {"cpu": int(0.8 * full)}

    model = quantize(done.source, options={"device_map": "sequential", "max_memory": limit})

    assert torch.equal(logits(model, make_batch(done.source, padding=3)), done.logits)
