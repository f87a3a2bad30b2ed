"""The optimisation of the encoder from `from_pretrained` to a reloaded model."""

import json

import pytest
import torch

from tests.configs import make_paper
from tests.jobs import contents, load, logits, make_batch, quantize

pytestmark = pytest.mark.integration

SETTINGS = {"vision_scheme": "w4a4", "encoder_lr": 2e-3, "encoder_l2": 100.0}


@pytest.mark.parametrize("mode", ["default", "paper"])
def test_a_saved_model_carries_what_was_learned(llava_folder, tmp_path, mode):
    """Nothing but the checkpoint's own tensors: a reload computes the same, bit for bit."""
    if mode == "paper":
        data = [make_batch(llava_folder, seed=seed, rows=4) for seed in (0, 1)]
        model = load(llava_folder, quantization_config=make_paper(dataset=data, **SETTINGS | {"encoder_epochs": 3}))
    else:
        model = quantize(llava_folder, "w4a4", **SETTINGS, encoder_epochs=3)
    batch = make_batch(llava_folder, padding=3)

    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")

    assert torch.equal(logits(again, batch), logits(model, batch))
    report = json.loads((tmp_path / "out" / "qvlm_report.json").read_text())["encoder"]
    assert len(report["losses"]) == 4
    assert report["chosen_epoch"] in range(4) and len(report["mean_depths"]) == 3


def test_without_epochs_the_bytes_are_those_of_a_calibration_without_it(llava_folder, tmp_path):
    """But for the settings that config.json and the report name, and the identity of the configuration."""
    for name, changes in (("plain", {}), ("zero", {"encoder_epochs": 0})):
        quantize(llava_folder, "w4a4", **changes).save_pretrained(tmp_path / name)

    plain, zero = contents(tmp_path / "plain"), contents(tmp_path / "zero")
    assert plain.keys() == zero.keys()
    assert {name for name in plain if plain[name] != zero[name]} <= {
        "qvlm_report.json",
        "qvlm_report.html",
        "qvlm_report.svg",
    }  # they hold seconds


def test_the_settings_are_saved(llava_folder, tmp_path):
    quantize(llava_folder, "w4a4", **SETTINGS, encoder_epochs=1).save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]

    assert saved["encoder_epochs"] == 1 and saved["encoder_lr"] == 2e-3
    assert saved["encoder_l1"] == 1.0 and saved["encoder_l2"] == 100.0 and saved["encoder_eta"] == 1.0
