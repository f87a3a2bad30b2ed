"""Where a checkpoint came from, and the files beside its weights."""

from pathlib import Path

import pytest

from optimum_qvlm.errors import DataError
from optimum_qvlm.hf.access import Access
from optimum_qvlm.hf.saving.source import Source
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRAVEL = [
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "added_tokens.json",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "qwen.tiktoken",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
    REPORT_FILE,
]
STAY = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "modeling_custom.py",
    "additional_chat_templates/notes.txt",
    "onnx/tokenizer.json",
]


def make_files(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def make_cache(root: Path, inside: str = "") -> Path:
    """A Hub cache as huggingface_hub lays it out: links into blobs. Returns the weights' path."""
    repo = root / "hub" / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    blob = repo / "blobs" / "b10b"
    blob.write_text("weights")
    weights = repo / "snapshots" / COMMIT / inside / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.symlink_to(blob)
    return weights


def test_a_local_folder_has_no_repository(tmp_path):
    source = Source.of([str(tmp_path / "model.safetensors")])

    assert source == Source(folder=tmp_path)


@pytest.mark.parametrize("inside", ["", "text_encoder"], ids=["top", "subfolder"])
def test_the_hub_cache_tells_repository_and_commit(tmp_path, inside):
    """The commit, since the branch may move on between loading and saving."""
    weights = make_cache(tmp_path, inside)

    source = Source.of([str(weights)])

    assert source == Source(folder=weights.parent, repo="org/name", revision=COMMIT, cache=tmp_path / "hub")


def test_a_folder_called_snapshots_is_no_cache(tmp_path):
    """Training runs are often kept in such folders."""
    folder = tmp_path / "snapshots" / "step-100"

    assert Source.of([str(folder / "model.safetensors")]) == Source(folder=folder)


def test_processor_templates_licence_and_report_travel(tmp_path):
    make_files(tmp_path, [*TRAVEL, *STAY])

    actual = Source(folder=tmp_path).sidecars()

    assert {name: file.content for name, file in actual.items()} == {name: name.encode() for name in TRAVEL}


def test_code_travels_where_it_is_trusted(tmp_path):
    """A processor of its own kind is nothing without; code that nobody trusts is not passed on."""
    make_files(tmp_path, [*TRAVEL, *STAY])

    actual = Source(folder=tmp_path, access=Access(trust_remote_code=True)).sidecars()

    assert set(actual) == {*TRAVEL, "modeling_custom.py"}


def test_a_folder_of_weights_has_no_sidecars(tmp_path):
    make_files(tmp_path, STAY)

    assert Source(folder=tmp_path).sidecars() == {}


def test_the_processor_beside_the_weights_is_loaded(bundled_folder):
    assert type(Source(folder=bundled_folder).load_processor()).__name__ == "LlavaProcessor"


def test_a_folder_without_processor_is_refused_with_both_ways_out(llava_folder):
    with pytest.raises(DataError, match=r"no processor could be loaded from .*pass processor= to QVLMConfig, or ready"):
        Source(folder=llava_folder).load_processor()
