"""Downloads through the real client: the same model as was pushed, with everything that lies beside it."""

import json

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoProcessor

from optimum_qvlm import QVLMConfig
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE
from optimum_qvlm.report.card import read_metadata
from tests.jobs import contents, logits, make_batch

REPO = "me/tiny"


def pull(**options):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(REPO, **options)


@pytest.fixture
def same(model, llava_folder):
    """Whether a loaded model gives the bits of the one that was pushed."""
    batch = make_batch(llava_folder)
    expected = logits(model, batch)
    return lambda found: torch.equal(logits(found, batch), expected)


@pytest.fixture
def bundled(hub, bundled_folder):
    """The bundled model in full precision as a repository, with a card that has a licence."""
    card = b"---\nlicense: apache-2.0\nlanguage: en\ntags: [digits]\n---\n# Tiny\n"
    there = {path: data for path, data in contents(bundled_folder).items() if not path.endswith((".py", ".pyc"))}
    return hub.add("org/base", there | {"README.md": card})


def test_a_pushed_model_is_the_same(hub, model, same):
    model.push_to_hub(REPO)

    assert same(pull())


def test_a_sharded_one_too(hub, model, same):
    model.push_to_hub(REPO, max_shard_size="50KB")

    assert len([name for name in hub.files(REPO) if name.endswith(".safetensors")]) > 2
    assert same(pull())


def test_a_variant(hub, model, same):
    model.push_to_hub(REPO, variant="again")

    assert same(pull(variant="again"))


@pytest.mark.parametrize("how", ["branch", "commit"])
def test_a_revision(hub, model, same, how):
    info = model.push_to_hub(REPO, revision="w4a8")
    hub.repos[REPO].commit("main", {"config.json": b"{}"}, "something else")

    assert same(pull(revision="w4a8" if how == "branch" else info.oid))


def test_a_subfolder(hub, model, same, tmp_path):
    model.save_pretrained(tmp_path / "out")
    hub.add(REPO, {f"inside/{name}": data for name, data in contents(tmp_path / "out").items()})

    assert same(pull(subfolder="inside"))


def test_a_cache_of_ones_own(hub, model, same, tmp_path):
    model.push_to_hub(REPO)

    assert same(pull(cache_dir=tmp_path / "own"))
    assert list((tmp_path / "own").glob("models--me--tiny/snapshots/*/model.safetensors"))


def test_a_private_repository_opens_with_the_token_alone(hub, model, same, monkeypatch):
    model.push_to_hub(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(OSError, match="me/tiny is not a local folder and is not a valid model identifier"):
        pull()

    assert same(pull(token="hf_owner"))


def test_a_gated_repository_says_so(hub, model, monkeypatch):
    model.push_to_hub(REPO)
    hub.repos[REPO].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_other")

    with pytest.raises(OSError, match="You are trying to access a gated repo"):
        pull()


def test_a_revision_that_is_not_there(hub, model):
    model.push_to_hub(REPO)

    with pytest.raises(OSError, match="nowhere is not a valid git identifier"):
        pull(revision="nowhere")


def test_offline_the_cache_is_enough(hub, model, same, monkeypatch):
    model.push_to_hub(REPO)
    pull()
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert same(pull())
    assert len(hub.requests) == asked


def test_saving_offline_still_saves(hub, model, same, tmp_path, monkeypatch):
    """A download that is not possible any more must not lose the model."""
    model.push_to_hub(REPO)
    actual = pull()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    actual.save_pretrained(tmp_path / "out")

    assert {"config.json", "model.safetensors"} <= set(contents(tmp_path / "out"))


def test_files_beside_the_weights_travel_from_source_to_repository(hub, bundled, bundled_folder):
    """Full precision on the Hub, quantized, pushed, pulled, saved: the processor arrives."""
    from transformers import AutoModelForImageTextToText

    config = QVLMConfig("w4a8", method="rtn")
    quantized = AutoModelForImageTextToText.from_pretrained("org/base", quantization_config=config)

    quantized.push_to_hub(REPO)

    there = hub.files(REPO)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert there[name] == (bundled_folder / name).read_bytes()
    assert REPORT_FILE in there
    processor = AutoProcessor.from_pretrained(REPO)
    assert processor.chat_template == AutoProcessor.from_pretrained(bundled_folder).chat_template


def test_the_card_names_its_base_and_takes_over_its_licence(hub, bundled):
    """Base and commit are the full-precision model's, also after the quantized one was pulled and pushed again."""
    from transformers import AutoModelForImageTextToText

    config = QVLMConfig("w4a8", method="rtn")
    AutoModelForImageTextToText.from_pretrained("org/base", quantization_config=config).push_to_hub(REPO)

    pull().push_to_hub("me/copy")

    for repo in (REPO, "me/copy"):
        card = hub.files(repo)["README.md"].decode()
        metadata = read_metadata(card)
        assert metadata["base_model"] == "org/base"
        assert metadata["base_model_relation"] == "quantized"
        assert (metadata["license"], metadata["language"]) == ("apache-2.0", "en")
        assert bundled in card
        assert f'from_pretrained("{repo}"' in card
    recorded = json.loads(hub.files("me/copy")["config.json"])["quantization_config"]["calibration"]
    assert (recorded["base_model"], recorded["base_revision"]) == ("org/base", bundled)


def test_the_clients_own_error_is_the_cause(hub, model, monkeypatch):
    from optimum_qvlm.errors import HubError

    with pytest.raises(HubError) as error:
        model.push_to_hub("their/tiny")

    assert isinstance(error.value.__cause__, HfHubHTTPError)
