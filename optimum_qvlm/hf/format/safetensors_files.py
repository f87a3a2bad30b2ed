"""Headers of safetensors files, read without the tensors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimum_qvlm.errors import CheckpointError

Manifest = dict[str, list[Any]]
"""Tensor name -> [dtype as safetensors spells it, shape]."""


def read_headers(files: Iterable[str | Path]) -> Manifest:
    """Names, dtypes and shapes of all tensors in some safetensors files.

    Raises:
        CheckpointError: a file is of another kind, truncated or not readable, or two hold a tensor of one name.
    """
    return merge_headers((file, _read_header(file)) for file in files)


def merge_headers(headers: Iterable[tuple[str | Path, Manifest]]) -> Manifest:
    """One manifest from those of (file, tensors).

    Raises:
        CheckpointError: two files hold a tensor of one name.
    """
    stored: Manifest = {}
    for file, tensors in headers:
        twice = stored.keys() & tensors.keys()
        if twice:
            raise CheckpointError(f"tensor {min(twice)} of {file} is in another file too; fetch the checkpoint again")
        stored |= tensors
    return stored


def _read_header(file: str | Path) -> Manifest:
    if not str(file).endswith(".safetensors"):
        raise CheckpointError(
            f"{file} is not a safetensors file, and pickled weights are not read; convert the checkpoint: load "
            "it without quantization_config and save_pretrained it"
        )
    tensors: Manifest = {}
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                part = shard.get_slice(name)
                tensors[name] = [part.get_dtype(), list(part.get_shape())]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or truncated ({error}); fetch it again") from error
    return tensors


def require_written_order(files: Iterable[str | Path]) -> None:
    """Refuse files in which tensors have changed places: two of equal shape do so without a trace in a manifest.

    safetensors writes the tensors of one dtype in the order of their names.

    Raises:
        CheckpointError: names two tensors in another order.
    """
    for file in files:
        last: dict[str, str] = {}
        for name, (dtype, shape) in _in_file_order(file):
            if 0 in shape:
                continue  # lies nowhere
            if name < last.get(dtype, ""):
                raise CheckpointError(
                    f"tensor {name} lies behind {last[dtype]} in {file}, where safetensors writes it before: their "
                    "values may be exchanged; fetch the checkpoint again"
                )
            last[dtype] = name


def _in_file_order(file: str | Path) -> list[tuple[str, list[Any]]]:
    with safe_open(file, framework="pt") as shard:
        slices = {name: shard.get_slice(name) for name in shard.offset_keys()}
        return [(name, [part.get_dtype(), list(part.get_shape())]) for name, part in slices.items()]


def read_tensor(files: Iterable[str | Path], name: str) -> Tensor:
    """One small tensor from whichever of the files holds it.

    Raises:
        CheckpointError: none does.
    """
    for file in files:
        with safe_open(file, framework="pt") as shard:
            if name in shard.keys():
                stored: Tensor = shard.get_tensor(name)
                return stored
    raise CheckpointError(f"tensor {name} is missing from the checkpoint's files; fetch it again")


def require_manifest(manifest: Mapping[str, Any], stored: Manifest) -> None:
    """Compare what is in the files with what was written.

    Raises:
        CheckpointError: names the first tensors that are missing, added or of another dtype or shape.
    """
    missing = sorted(set(manifest) - set(stored))
    if missing:
        raise CheckpointError(f"{_listed(missing)} missing from the checkpoint's files; fetch it again")
    added = sorted(set(stored) - set(manifest))
    if added:
        raise CheckpointError(f"{_listed(added)} in the checkpoint's files but not in its manifest; fetch it again")
    for name, expected in manifest.items():
        if list(expected) != stored[name]:
            raise CheckpointError(
                f"tensor {name} has dtype {stored[name][0]} and shape {stored[name][1]}, but was written with dtype "
                f"{expected[0]} and shape {expected[1]}; fetch the checkpoint again"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"
