"""Headers of safetensors files against what was written."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.safetensors_files import read_headers, read_tensor, require_manifest


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two files with three tensors."""
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(4, dtype=torch.int32)}, first)
    save_file({"c": torch.empty(0)}, second)
    return [first, second]


def test_headers_of_all_files_are_joined(shards):
    assert read_headers(shards) == {"a": ["BF16", [2, 3]], "b": ["I32", [4]], "c": ["F32", [0]]}


def test_files_may_be_named_by_text(shards):
    """transformers hands over strings."""
    assert read_headers(map(str, shards)) == read_headers(shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors.bin"])
def test_pickles_are_refused_without_being_opened(tmp_path, name):
    """Reading one can run code."""
    with pytest.raises(CheckpointError, match=f"{name} is not a safetensors file, and pickled weights are not read"):
        read_headers([tmp_path / name])


@pytest.mark.parametrize("lost", [1, 8, 10**6], ids=["one byte", "some bytes", "everything"])
def test_truncated_files_are_refused(shards, lost):
    os.truncate(shards[0], max(0, shards[0].stat().st_size - lost))

    with pytest.raises(CheckpointError, match=r"1.safetensors is damaged or truncated \(.*\); fetch it again"):
        read_headers(shards)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone.safetensors is damaged or truncated"):
        read_headers([tmp_path / "gone.safetensors"])


def test_files_as_written_are_accepted(shards):
    require_manifest(read_headers(shards), read_headers(shards))


def test_a_manifest_read_from_json_is_accepted(shards):
    """JSON knows lists and tuples as one."""
    require_manifest({"a": ("BF16", [2, 3]), "b": ["I32", [4]], "c": ["F32", [0]]}, read_headers(shards))


@pytest.mark.parametrize(
    "names, message",
    [
        (["x"], "tensor x is missing from the checkpoint's files; fetch it again"),
        (["y", "x"], "tensors x, y are missing"),
        (list("zyxwv"), "tensors v, w, x and 2 more are missing"),
    ],
    ids=["one", "two", "many"],
)
def test_missing_tensors_are_named(shards, names, message):
    manifest = read_headers(shards) | {name: ["F32", [1]] for name in names}

    with pytest.raises(CheckpointError, match=message):
        require_manifest(manifest, read_headers(shards))


def test_added_tensors_are_refused(shards):
    """They would be loaded over tensors of the manifest, or be ignored: neither is what was saved."""
    manifest = read_headers(shards)
    del manifest["b"]

    with pytest.raises(CheckpointError, match="tensor b is in the checkpoint's files but not in its manifest"):
        require_manifest(manifest, read_headers(shards))


@pytest.mark.parametrize("written", [["F16", [2, 3]], ["BF16", [3, 2]], ["BF16", [6]]], ids=["dtype", "shape", "rank"])
def test_changed_tensors_are_refused_with_both_forms(shards, written):
    manifest = read_headers(shards) | {"a": written}

    with pytest.raises(
        CheckpointError, match=r"tensor a has dtype BF16 and shape \[2, 3\], but was written with dtype"
    ):
        require_manifest(manifest, read_headers(shards))


def test_one_tensor_is_read_from_whichever_file_holds_it(shards):
    assert read_tensor(map(str, shards), "b").tolist() == [0, 0, 0, 0]
    assert read_tensor(shards, "c").numel() == 0


def test_a_tensor_that_no_file_holds_is_refused(shards):
    with pytest.raises(CheckpointError, match="tensor x is missing from the checkpoint's files; fetch it again"):
        read_tensor(shards, "x")
