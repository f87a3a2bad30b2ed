"""The content of `qvlm_report.json`."""

import json
import platform

import pytest
import torch
import transformers

from optimum_qvlm import QVLMConfig, __version__
from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.report.summary import summarize
from tests.plans import CPU, plan_for
from tests.tiny_models import llava_batch, tiny_llava

RECIPE = Recipe(source="user", samples=2, seed=0, fingerprint="ab")


@pytest.fixture(scope="module")
def results():
    """A searched and a rounded calibration, with their settings."""
    actual = {}
    for method in ("qvlm", "rtn"):
        config = QVLMConfig("w4a4", method=method, dataset=[{"question": "secret"}])
        data = None if method == "rtn" else CalibrationData(batches=[llava_batch()], recipe=RECIPE)
        model = tiny_llava()
        actual[method] = calibrate(model, plan_for(model, "w4a4"), config.options(), data, CPU), config.to_dict()
    return actual


def summary_of(results, method="qvlm"):
    result, settings = results[method]
    return summarize(result, settings, bytes_before=1000, bytes_after=300)


@pytest.mark.parametrize("method", ["qvlm", "rtn"])
def test_a_report_is_plain_json(results, method):
    """NaN and infinity are not JSON, and browsers refuse them."""
    report = summary_of(results, method)

    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_sizes_and_their_ratio(results):
    assert summary_of(results)["bytes"] == {"before": 1000, "after": 300, "ratio": 3.333, "source_files": None}


def test_linears_are_counted_per_scheme(results):
    """Three tower layers of six and two of the projector; two decoder layers of seven."""
    assert summary_of(results)["linears_per_scheme"] == {"w8a8": 20, "w4a4": 14}


def test_what_stays_in_full_precision_is_named(results):
    assert summary_of(results)["kept_in_full_precision"] == ["lm_head"]


def test_data_and_versions_are_recorded(results):
    calibration = summary_of(results)["calibration"]

    assert calibration == {
        "method": "qvlm",
        **RECIPE.to_dict(),
        "versions": {
            "optimum_qvlm": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def test_rounding_to_nearest_has_no_data_to_record(results):
    assert set(summary_of(results, "rtn")["calibration"]) == {"method", "versions"}


def test_settings_are_recorded_without_data(results):
    report = summary_of(results)

    assert report["settings"]["scheme"] == "w4a4"
    assert "secret" not in json.dumps(report)


def test_every_layer_site_and_module_is_listed(results):
    report = summary_of(results)

    assert [layer["part"] for layer in report["layers"]] == ["vision"] * 2 + ["projector"] + ["language"] * 2
    assert len(report["modules"]) == 34
    searched = {module["site"] for name, module in report["modules"].items() if "encoder.layers.2" not in name}
    assert {site["site"] for site in report["sites"]} == searched


@pytest.mark.parametrize("method", ["qvlm", "rtn"])
def test_layers_that_nothing_reads_are_named(results, method):
    """Nothing was measured on them, which a reader should know."""
    assert summary_of(results, method)["unused"] == ["model.vision_tower.encoder.layers.2"]


def test_blocks_are_listed_with_their_errors(results):
    """Dependency, threshold, borders, and what the joint search did inside them."""
    report = summary_of(results)

    assert {entry["part"] for entry in report["dependency"]} == {"vision", "language"}
    assert report["threshold"] > 0
    layers = [n for block in report["blocks"] for n in range(block["first"], block["last"] + 1)]
    assert len(layers) == len(report["layers"])
    for block in report["blocks"]:
        assert 0 <= block["after"] <= block["before"]
        assert block["forwards"] >= 1 and 0 < block["share"] <= 1 and block["seconds"] >= 0


def test_rounding_to_nearest_has_blocks_of_one_layer_and_no_search(results):
    report = summary_of(results, "rtn")

    assert report["threshold"] is None and report["dependency"] == []
    assert all(set(block) == {"part", "first", "last"} for block in report["blocks"])
