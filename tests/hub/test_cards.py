"""Model cards on the Hub: ours survives the push, one that somebody wrote is never overwritten."""

import warnings

import pytest
from huggingface_hub import ModelCard

from optimum_qvlm.report.card import is_ours, read_metadata
from tests.jobs import load, quantize

REPO = "me/tiny"
MINE = b"---\nlicense: mit\n---\n# Mine\nWritten by hand.\n"


def test_the_card_that_arrives_is_ours(hub, model):
    """transformers writes a README.md of its own over what lies in the folder when it pushes."""
    model.push_to_hub(REPO)

    card = hub.files(REPO)["README.md"].decode()
    assert is_ours(card)
    assert f'from_pretrained("{REPO}"' in card
    assert card.index("import optimum_qvlm") < card.index("from transformers")


def test_the_hub_accepts_its_metadata(hub, model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Warnings while validating metadata")
        model.push_to_hub(REPO, tags=["digits"])

    card = ModelCard.load(REPO)
    assert hub.asked("POST", "/api/validate-yaml")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"qvlm", "quantized", "w4a8", "4-bit", "digits"} <= set(card.data.tags)


def test_an_untouched_card_is_renewed(hub, model, llava_folder):
    quantize(llava_folder, scheme="w4a16").push_to_hub(REPO)

    model.push_to_hub(REPO)

    assert "w4a8" in read_metadata(hub.files(REPO)["README.md"].decode())["tags"]


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_a_card_that_somebody_wrote_on_the_hub_stays(hub, model, tmp_path, how):
    hub.add(REPO, {"README.md": MINE})

    if how == "push_to_hub":
        model.push_to_hub(REPO)
    else:
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=REPO)

    assert hub.files(REPO)["README.md"] == MINE
    assert "model.safetensors" in hub.files(REPO)


def test_an_edited_card_of_ours_stays(hub, model):
    """Somebody added a sentence in the browser."""
    model.push_to_hub(REPO)
    edited = hub.files(REPO)["README.md"].replace(b"## How to use", b"Not for use on roads.\n\n## How to use")
    hub.repos[REPO].commit("main", dict(hub.files(REPO)) | {"README.md": edited}, "edit")

    model.push_to_hub(REPO, max_shard_size="50KB")

    assert hub.files(REPO)["README.md"] == edited


def test_a_card_that_is_no_text_stays(hub, model):
    hub.add(REPO, {"README.md": b"\xff\xfe\x00"})

    model.push_to_hub(REPO)

    assert hub.files(REPO)["README.md"] == b"\xff\xfe\x00"


def test_the_card_in_the_folder_goes_along(hub, model, tmp_path):
    """Also where the user wrote it, and the Hub has none."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_bytes(MINE)

    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=REPO)

    assert (tmp_path / "out" / "README.md").read_bytes() == MINE
    assert hub.files(REPO)["README.md"] == MINE


def test_tags_that_were_added_to_the_model_are_in_the_card(hub, folder_of_model):
    loaded = load(folder_of_model)
    loaded.add_model_tags(["roads"])

    loaded.push_to_hub(REPO)

    assert "roads" in read_metadata(hub.files(REPO)["README.md"].decode())["tags"]


@pytest.fixture
def folder_of_model(model, tmp_path):
    """The model as saved."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
