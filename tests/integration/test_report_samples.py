"""What a report keeps of samples: nothing of the user's own unless the user says so."""

import json

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from optimum_qvlm.hf.access import Access
from optimum_qvlm.hf.calibration_data import reader_of_answers
from optimum_qvlm.hf.saving.source import Source
from optimum_qvlm.hf.saving.weight_files import REPORT_FILES
from tests.configs import make_config
from tests.jobs import contents

pytestmark = pytest.mark.integration

QUICK = {
    "method": "layerwise",
    "effort": "fast",
    "transforms": "off",
    "error_feedback": False,
    "token_weights": False,
    "search_tokens": 64,
}
QUESTION = "how many digits of my secret are there?"


def records():
    """More than are calibrated on."""
    colours = ["red", "green", "blue", "white"]
    return [{"image": Image.new("RGB", (48, 48), colour), "question": QUESTION, "answer": "4"} for colour in colours]


@pytest.fixture(scope="module")
def saved(bundled_folder, tmp_path_factory):
    """Folders of a quick calibration by `report_samples`."""

    def make(kept):
        folder = tmp_path_factory.mktemp("samples")
        asked = {} if kept is None else {"report_samples": kept}
        config = make_config("w8a8", dataset=records(), num_samples=2, **QUICK, **asked)
        AutoModelForImageTextToText.from_pretrained(bundled_folder, quantization_config=config).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kept", [None, "none"], ids=["by default", "none"])
def test_nothing_of_the_users_own_samples_is_saved_or_shown(saved, kept):
    """A folder is pushed as it is."""
    files = contents(saved(kept))

    assert "samples" not in json.loads(files["qvlm_report.json"])["fidelity"]
    for name, content in files.items():
        assert b"secret" not in content, name
    assert b"data:image" not in files["qvlm_report.html"]


@pytest.mark.parametrize("kept", ["answers", "images"])
def test_what_the_user_allows_is_shown(saved, kept):
    files = contents(saved(kept))

    samples = json.loads(files["qvlm_report.json"])["fidelity"]["samples"]
    assert [sample["prompt"] for sample in samples] == [QUESTION] * 2
    assert all(sample["reference"] != "" for sample in samples)
    assert [len(sample.get("images", [])) for sample in samples] == [1 if kept == "images" else 0] * 2
    assert files["qvlm_report.html"].count(b"<img ") == (2 if kept == "images" else 0)
    assert QUESTION.encode() in files["qvlm_report.html"]
    assert QUESTION.encode() not in files["README.md"] + files["qvlm_report.svg"] + files["config.json"]
    assert set(REPORT_FILES) <= set(files)


@pytest.mark.parametrize(
    "kept, origin, reads",
    [("auto", "packaged", True), ("auto", "preset:scienceqa", True), ("auto", "user", False),
     ("auto", "datasets.Dataset", False), ("none", "packaged", False), ("answers", "user", True)],
)  # fmt: skip
def test_public_samples_may_be_shown(bundled_folder, kept, origin, reads):
    """Everybody has them."""
    config, source = make_config(report_samples=kept), Source(folder=bundled_folder, access=Access())

    assert (reader_of_answers(config, source, origin) is not None) == reads


def test_without_a_tokenizer_no_answer_is_kept(llava_folder):
    """Ready model inputs need none."""
    source = Source(folder=llava_folder, access=Access())

    assert reader_of_answers(make_config(report_samples="answers"), source, "user") is None
