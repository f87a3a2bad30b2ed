"""The index of shards: what transformers would trip over is refused by name first."""

import json
from pathlib import Path

import pytest

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.index import (
    INDEX,
    WEIGHTS,
    parse_json,
    require_index,
    require_index_in,
    require_index_of,
    shards_of,
)
from optimum_qvlm.hf.format.record import CalibrationRecord, config_digest

SOUND = {
    "metadata": {"total_size": 8},
    "weight_map": {"b": "two.safetensors", "a": "one.safetensors", "c": "one.safetensors"},
}


def as_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


def folder_with(tmp_path: Path, index: object) -> Path:
    (tmp_path / INDEX).write_bytes(as_bytes(index))
    return tmp_path


def test_each_shard_is_named_once():
    assert shards_of(as_bytes(SOUND), INDEX) == ["one.safetensors", "two.safetensors"]


def test_folders_inside_and_a_dtype_are_fine():
    """transformers takes both."""
    index = {"metadata": {"dtype": "bfloat16"}, "weight_map": {"a": "inside/one.safetensors"}}

    assert shards_of(as_bytes(index), INDEX) == ["inside/one.safetensors"]


@pytest.mark.parametrize(
    "index, message",
    [
        ({"metadata": {}}, "has no weight_map and metadata"),
        ({"metadata": {}, "weight_map": {}}, "has no weight_map and metadata"),
        ({"metadata": {}, "weight_map": ["one.safetensors"]}, "has no weight_map and metadata"),
        ({"weight_map": SOUND["weight_map"]}, "has no weight_map and metadata"),
        ({"metadata": None, "weight_map": SOUND["weight_map"]}, "has no weight_map and metadata"),
        ({"metadata": {}, "weight_map": {"a": 5}}, "names '5', which is no safetensors file"),
        ({"metadata": {}, "weight_map": {"a": ["x"]}}, "which is no safetensors file"),
        ({"metadata": {}, "weight_map": {"a": "../one.safetensors"}}, "which is outside its folder"),
        ({"metadata": {}, "weight_map": {"a": "x\\one.safetensors"}}, "which is outside its folder"),
        (
            {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}},
            "names 'pytorch_model.bin', which is no safetensors",
        ),
        ({"metadata": {}, "weight_map": {"a": "/tmp/one.safetensors"}}, "which is outside its folder"),
        ({"metadata": {}, "weight_map": {"a": "\0.safetensors"}}, "which is outside its folder"),
        (
            {"metadata": {"dtype": "int8"}, "weight_map": SOUND["weight_map"]},
            "says dtype 'int8', none of floating point",
        ),
        ({"metadata": {"dtype": []}, "weight_map": SOUND["weight_map"]}, r"says dtype '\[\]', none of floating point"),
        ([], "holds a list where an object is expected"),
    ],
)
def test_what_is_no_index_is_refused(index, message):
    with pytest.raises(CheckpointError, match=message):
        shards_of(as_bytes(index), INDEX)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(CheckpointError, match="is not JSON"):
        parse_json(data, INDEX)


def test_a_folder_is_checked_where_its_index_counts(tmp_path):
    """transformers takes a single file first, and never opens an index that lies beside it."""
    require_index_in(tmp_path)
    folder = folder_with(tmp_path, {})

    with pytest.raises(CheckpointError, match=INDEX):
        require_index_in(folder)
    with pytest.raises(CheckpointError, match=INDEX):
        require_index(str(folder))

    (folder / WEIGHTS).touch()
    require_index_in(folder)


def test_the_index_of_another_configuration_is_left_alone(tmp_path):
    """With `subfolder` the name is that of the folder above, whose index is not what will be read."""
    values = QVLMConfig("w4a8").to_dict()
    folder = folder_with(tmp_path, {})
    (folder / "config.json").write_bytes(as_bytes({"quantization_config": values}))
    config = QVLMConfig("w4a8")
    config.record = CalibrationRecord(modules={}, found_digest=config_digest(values))

    with pytest.raises(CheckpointError, match=INDEX):
        require_index_of(config, str(folder))

    config.record.found_digest = config_digest(values | {"scheme": "w8a8"})
    require_index_of(config, str(folder))


@pytest.mark.parametrize("name", ["", "me/some-repository"])
def test_a_name_that_is_no_folder_is_left_alone(name, tmp_path, monkeypatch):
    """The empty name, of a configuration that was not read from anywhere, must not mean the working directory."""
    folder_with(tmp_path, {})
    (tmp_path / "config.json").write_bytes(as_bytes({"quantization_config": {}}))
    monkeypatch.chdir(tmp_path)

    require_index_of(QVLMConfig("w4a8"), name)
