"""The joint search and the paper's mode as users meet them: configuration, saved folder, reload."""

import json

import pytest
import torch

from optimum_qvlm.hf.format.modules import quantized_modules
from tests.configs import make_paper
from tests.jobs import contents, load, logits, make_batch, quantize

pytestmark = pytest.mark.integration


def paper(folder, bits=4, **settings):
    data = [make_batch(folder, seed=0, padding=2), make_batch(folder, seed=1)]
    return load(folder, quantization_config=make_paper(bits, dataset=data, **settings))


def without_times(report):
    """A report, less how long things took."""
    report = json.loads(report)
    del report["seconds"]
    for block in report["blocks"]:
        del block["seconds"]
    if report["encoder"] is not None:
        del report["encoder"]["seconds"]
    return report


@pytest.mark.parametrize("mode", ["default", "paper"])
def test_the_same_seed_gives_the_same_bytes_on_disk(llava_folder, tmp_path, mode):
    """Everything but the times in the report."""
    saved = []
    for name in ("first", "second"):
        model = quantize(llava_folder, "w4a4", search_tokens=10) if mode == "default" else paper(llava_folder)
        model.save_pretrained(tmp_path / name)
        saved.append(contents(tmp_path / name))

    reports = [without_times(files.pop("qvlm_report.json")) for files in saved]
    for files in saved:  # they show the same times
        del files["qvlm_report.html"], files["qvlm_report.svg"]
    assert saved[0] == saved[1]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("family", ["llava", "llama"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_static_scales_reload_bit_for_bit(family, bits, llava_folder, llama_folder, tmp_path):
    """They are tensors of the checkpoint, under `input_scale`."""
    folder = llava_folder if family == "llava" else llama_folder
    model = paper(folder, bits)
    model.save_pretrained(tmp_path / "out")

    again = load(tmp_path / "out")

    batch = make_batch(folder, padding=3)
    assert torch.equal(logits(again, batch), logits(model, batch))
    modules = quantized_modules(again).values()
    scales = [module.input_scale for module in modules if module.format.activation.static]
    assert scales and all(scale.shape == (1,) for scale in scales)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    static = {name for name, entry in config["modules"].items() if entry["activation_static"]}
    assert static == {name for name in config["modules"] if f"{name}.input_scale" in config["manifest"]}
    unseen = [name for name in config["modules"] if name not in static]
    assert all("encoder.layers.2." in name for name in unseen)  # the tower's last layer, which nothing reads
    assert all(config["modules"][name]["activation_group"] is None for name in static)


def test_the_partition_is_saved_with_the_model(llama_folder, tmp_path):
    quantize(llama_folder, "w4a4", threshold=0.0).save_pretrained(tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["blocks"] == [{"part": "language", "first": 0, "last": 1}]
    assert load(tmp_path / "out").config.quantization_config.threshold == 0.0


def test_layers_of_a_block_are_given_back(llava_folder):
    """Nothing of a trial is left in the finished model."""
    model = quantize(llava_folder, "w4a4", threshold=0.0)

    assert "TrialLinear" not in {type(module).__name__ for module in model.modules()}
