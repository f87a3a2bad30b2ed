"""What `from_pretrained` is told about the Hub holds for the quantizer's own downloads as well."""

import copy

import pytest
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor
from transformers.utils import logging

from optimum_qvlm import QVLMConfig, dry_run
from optimum_qvlm.errors import DataError
from tests.jobs import contents

BASE, REPO = "me/base", "me/tiny"
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def files(bundled_folder):
    """The bundled model in full precision."""
    return {path: data for path, data in contents(bundled_folder).items() if not path.endswith((".py", ".pyc"))}


@pytest.fixture
def stranger(hub, monkeypatch):
    """Nobody is logged in."""
    monkeypatch.delenv("HF_TOKEN")


def calibrated(name=BASE, config=None, **options):
    """Quantized on two packaged samples, which takes the repository's processor."""
    config = QVLMConfig("w4a8", method="layerwise", effort="fast", num_samples=2) if config is None else config
    return AutoModelForImageTextToText.from_pretrained(name, quantization_config=config, **options)


def test_a_private_model_is_quantized_and_saved_with_the_token_alone(hub, files, stranger, tmp_path, caplog):
    logging.enable_propagation()
    hub.add(BASE, files, private=True)

    calibrated(token="hf_owner").save_pretrained(tmp_path / "out")

    assert set(contents(tmp_path / "out")) >= PROCESSOR
    assert "hf_owner" not in (tmp_path / "out" / "config.json").read_text()
    assert "did not tell" not in caplog.text


def test_a_private_quantized_model_is_loaded_and_saved_with_the_token_alone(hub, model, stranger, tmp_path, files):
    """Also by a deep copy, which is another model."""
    model.save_pretrained(tmp_path / "first")
    hub.add(REPO, files | contents(tmp_path / "first"), private=True)
    found = AutoModelForImageTextToText.from_pretrained(REPO, token="hf_owner")

    copy.deepcopy(found).save_pretrained(tmp_path / "out")

    assert set(contents(tmp_path / "out")) >= PROCESSOR


def test_a_dry_run_takes_the_token(hub, files, stranger):
    hub.add(BASE, {f"inside/{name}": data for name, data in files.items()}, private=True)
    config = QVLMConfig("w4a8", method="layerwise", effort="fast", num_samples=2)

    shown = dry_run(BASE, config, token="hf_owner", subfolder="inside")

    assert shown.samples == 2


def test_a_private_processor_takes_the_token(hub, files, stranger, llava_folder, tmp_path):
    """One that is named in the configuration, for a model that has none."""
    hub.add(BASE, {name: data for name, data in files.items() if name not in PROCESSOR}, private=True)
    hub.add("me/processor", {name: files[name] for name in (*PROCESSOR, "config.json")}, private=True)
    config = QVLMConfig("w4a8", method="layerwise", effort="fast", num_samples=2, processor="me/processor")

    calibrated(config=config, token="hf_owner", cache_dir=tmp_path / "own").save_pretrained(tmp_path / "out")

    assert set(contents(tmp_path / "out")) >= PROCESSOR
    assert list((tmp_path / "own").glob("models--me--processor/snapshots/*/tokenizer.json"))


def test_revision_subfolder_variant_and_cache_are_those_of_the_weights(hub, files, tmp_path):
    """Processor files come from the same commit and folder, into the same cache."""
    inside = {f"inside/{name.replace('model.', 'model.fp16.')}": data for name, data in files.items()}
    hub.add(BASE, inside | {"inside/LICENSE": b"of the branch"}, branch="old")
    hub.repos[BASE].commit("main", {"config.json": b"{}", "inside/LICENSE": b"of main"}, "later")
    where = {"revision": "old", "subfolder": "inside", "variant": "fp16", "cache_dir": tmp_path / "own"}

    calibrated(**where).save_pretrained(tmp_path / "out")

    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"of the branch"
    assert set(contents(tmp_path / "out")) >= PROCESSOR
    assert [path.name for path in (tmp_path / "own").glob("models--*")] == ["models--me--base"]
    # with PEFT installed transformers itself looks for an adapter, in the default cache
    assert not list((tmp_path / "hub-cache").glob("*/blobs/*"))


def test_local_files_only_asks_nobody(hub, files, tmp_path):
    hub.add(BASE, files)
    calibrated().save_pretrained(tmp_path / "first")
    asked = len(hub.requests)

    calibrated(local_files_only=True).save_pretrained(tmp_path / "out")

    assert len(hub.requests) == asked
    assert set(contents(tmp_path / "out")) >= PROCESSOR


def test_a_processor_that_cannot_be_fetched_says_how_to_log_in(hub, files, stranger):
    """Weights may lie in the cache since the user was logged in, and the processor not."""
    hub.add(BASE, files, private=True)
    AutoModelForImageTextToText.from_pretrained(BASE, token="hf_owner")
    said = "no processor could be loaded from .*for a private model log in with `hf auth login` or set HF_TOKEN; else"

    with pytest.raises(DataError, match=said):
        calibrated(local_files_only=True)


def test_a_save_without_a_token_that_works_says_how_to_log_in(hub, model, stranger, tmp_path, files, caplog):
    """The model was loaded while its token was good."""
    logging.enable_propagation()
    model.save_pretrained(tmp_path / "first")
    hub.add(REPO, files | contents(tmp_path / "first"), private=True)
    found = AutoModelForImageTextToText.from_pretrained(REPO, token="hf_owner")
    del hub.tokens["hf_owner"]

    found.save_pretrained(tmp_path / "out")

    assert "processor files of me/tiny could not be fetched" in caplog.text
    assert "for a private model log in with `hf auth login` or set HF_TOKEN" in caplog.text
    assert {"config.json", "model.safetensors"} <= set(contents(tmp_path / "out"))


def test_a_processor_loads_from_what_was_saved(hub, files, stranger, tmp_path):
    hub.add(BASE, files, private=True)

    calibrated(token="hf_owner").save_pretrained(tmp_path / "out")

    assert type(AutoProcessor.from_pretrained(tmp_path / "out")).__name__ == "LlavaProcessor"


@pytest.mark.parametrize("quantized", [False, True], ids=["calibrated", "loaded"])
def test_of_a_model_that_cannot_generate_it_is_said_that_options_are_unknown(
    hub, files, llama_folder, stranger, tmp_path, caplog, quantized
):
    """transformers tells them to the method for generation files only. Saving goes on with what the cache holds."""
    logging.enable_propagation()
    classifier, config = AutoModelForSequenceClassification, QVLMConfig("w4a8", method="rtn")
    base = contents(llama_folder)
    if quantized:
        classifier.from_pretrained(llama_folder, quantization_config=config).save_pretrained(tmp_path / "first")
        base, config = contents(tmp_path / "first"), None
    hub.add(BASE, base | {"tokenizer.json": files["tokenizer.json"]}, private=True)
    model = classifier.from_pretrained(BASE, token="hf_owner", **({"quantization_config": config} if config else {}))

    model.save_pretrained(tmp_path / "out")

    assert "did not tell token, cache_dir, local_files_only and trust_remote_code of from_pretrained" in caplog.text
    assert "log in with `hf auth login` or set HF_TOKEN" in caplog.text
