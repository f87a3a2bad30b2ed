"""Device maps: where calibration computes and where the result goes."""

import sys

import pytest
import torch
from torch import nn

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.hf.placement import Placement
from tests.tiny_models import tiny_llava

SPLIT = {"model.vision_tower": "cpu", "model.multi_modal_projector": 0, "model.language_model": 1, "lm_head": 1}
PLENTY = 10**9


@pytest.fixture
def skeleton():
    """What Placement looks at in a quantized model: sizes, on no device."""
    with torch.device("meta"):
        return type(tiny_llava())(tiny_llava().config)


@pytest.mark.parametrize(
    "requested, loaded", [(None, None), ({"": 0}, {"": "cpu"}), (SPLIT, {"": "cpu"}), ("auto", "auto")]
)
def test_models_are_loaded_on_the_cpu(requested, loaded):
    """Automatic maps stay: transformers calls `adjust_max_memory`, which is told the limits, for them only."""
    assert Placement(requested).on_cpu() == loaded


@pytest.mark.parametrize(
    "requested, name",
    [({"": "disk"}, "the model"), ({"model": "cpu", "lm_head": "disk"}, "lm_head")],
    ids=["whole", "part"],
)
def test_disk_is_refused_at_once(requested, name):
    with pytest.raises(ConfigError, match=f"{name} would be offloaded to disk, which calibration cannot do; give more"):
        Placement(requested)


@pytest.mark.parametrize("requested", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_model_that_does_not_fit_is_refused_before_calibration(requested, skeleton):
    with pytest.raises(ConfigError, match=r"would be offloaded to disk, .* \(max_memory\)"):
        Placement(requested).note_memory({"cpu": 10_000}, skeleton)


@pytest.mark.parametrize("requested", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_full_precision_is_loaded_on_the_cpu_whatever_the_limits(requested, skeleton):
    """The limits are meant for the quantized model."""
    placement = Placement(requested)

    assert placement.note_memory({"cpu": PLENTY}, skeleton) == {"cpu": sys.maxsize}
    assert placement.final == {"": "cpu"}


def test_automatic_maps_use_the_accelerator_first(skeleton):
    placement = Placement("sequential")

    placement.note_memory({0: PLENTY, "cpu": PLENTY}, skeleton)

    assert placement.final == {"": 0}


def test_automatic_maps_do_not_split_layers(skeleton):
    """Residual connections would cross devices."""
    placement = Placement("sequential")

    placement.note_memory({0: 250_000, "cpu": PLENTY}, skeleton)

    assert set(placement.final.values()) == {0, "cpu"}
    assert not [name for name in placement.final if ".layers." in name and name.rpartition(".layers.")[2].count(".")]


@pytest.mark.parametrize(
    "requested, device",
    [
        (None, "cpu"),
        ({"": "cpu"}, "cpu"),
        ({"": 1}, "cuda:1"),
        ({"": "cuda:1"}, "cuda:1"),
        ({"": torch.device("cuda", 1)}, "cuda:1"),
        (SPLIT, "cuda:1"),
    ],
    ids=["none", "cpu", "index", "text", "device", "most often"],
)
def test_blocks_are_searched_on_the_accelerator_that_is_named_most(requested, device):
    assert Placement(requested).compute_device() == torch.device(device)


@pytest.mark.parametrize("limits, device", [({0: PLENTY, 1: 1, "cpu": 1}, "cuda:0"), ({"cpu": PLENTY}, "cpu")])
def test_with_an_automatic_map_blocks_are_searched_on_the_first_accelerator(limits, device):
    placement = Placement("auto", max_memory=limits)

    assert placement.compute_device() == torch.device(device)


@pytest.mark.parametrize("requested", [{"": 99}, {"": "cuda:99"}, {"": "cpu", "head": torch.device("cuda", 99)}])
def test_a_device_that_is_not_there_is_refused(requested):
    """Before weights are loaded; torch's own error would come when calibration begins."""
    with pytest.raises(ConfigError, match=r"device cuda:99 cannot be used here .*; choose another one, as cpu"):
        Placement(requested).require_devices()


@pytest.mark.parametrize("requested", [None, "auto", {"": "cpu"}, {"a": torch.device("cpu"), "b": "cpu"}])
def test_devices_that_are_there_pass(requested):
    Placement(requested).require_devices()


def test_the_map_is_left_on_the_model():
    """As transformers does; accelerate and pipelines look at it."""
    model = nn.Linear(2, 2)

    Placement({"": "cpu"}).apply(model)

    assert model.hf_device_map == {"": "cpu"}


def test_without_a_map_nothing_is_done():
    model = nn.Linear(2, 2)

    Placement(None).apply(model)

    assert not hasattr(model, "hf_device_map")
