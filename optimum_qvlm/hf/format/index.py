"""The index of a checkpoint in shards, looked at before transformers takes its form for granted."""

from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.files import strict_json
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.format.record import config_digest
from optimum_qvlm.hf.format.safetensors_files import read_headers
from optimum_qvlm.hf.saving.source import is_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = ("float64", "float32", "float16", "bfloat16")
LARGEST_JSON = 256 * 2**20
EXPLICIT = "transformers_weights"
"""Field of config.json that names the weights to load in place of those with the usual names."""


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is something else, or too large or too deep to be sound.
    """
    if len(data) > LARGEST_JSON:
        raise CheckpointError(f"{name} has {len(data)} bytes, more than the {LARGEST_JSON} that are read")
    try:
        parsed = strict_json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON ({error}); fetch it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name} holds a {type(parsed).__name__} where an object is expected; fetch it again")
    return parsed


def shards_of(data: bytes, name: str) -> list[str]:
    """Names of the files that the content of an index lists, each once.

    Raises:
        CheckpointError: it is no index, or names what is not a safetensors file of its folder.
    """
    content = parse_json(data, name)
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or len(weight_map) == 0 or not isinstance(metadata, dict):
        raise CheckpointError(f"{name} has no weight_map and metadata that name files; fetch it again")
    if "dtype" in metadata and metadata["dtype"] not in FLOATING:
        raise CheckpointError(
            f"{name} says dtype {str(metadata['dtype'])[:60]!r}, none of floating point; fetch it again"
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{name} names {str(shard)[:60]!r}, which is no safetensors file; fetch it again")
        require_inner_name(shard, name)
    return sorted(set(weight_map.values()))


def require_inner_name(file: str, name: str) -> str:
    """A file's name that `name` holds, if it is one of the same folder.

    Raises:
        CheckpointError: it leads elsewhere.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
        raise CheckpointError(f"{name} names {file[:60]!r}, which is outside its folder; fetch it again")
    return file


def require_index_in(folder: Path) -> None:
    """Check the index of a folder, where there is one and no single file that goes first.

    Raises:
        CheckpointError: it is not sound.
    """
    path = folder / INDEX
    if path.is_file() and not (folder / WEIGHTS).is_file():
        _require_file(path)


def require_index_of(config: QVLMConfig, name: str) -> None:
    """Check the index beside the configuration that was read, where `name` is the folder of both.

    Raises:
        CheckpointError: it is not sound.
    """
    path = Path(name) / "config.json"
    if name == "" or not path.is_file():
        return  # a repository, or a configuration without a name
    content = parse_json(path.read_bytes(), str(path))
    values, explicit = content.get("quantization_config"), content.get(EXPLICIT)
    if isinstance(values, dict) and (config.record is None or config_digest(values) == config.record.found_digest):
        if isinstance(explicit, str) and explicit.endswith(".json") and (path.parent / explicit).is_file():
            _require_file(path.parent / require_inner_name(explicit, str(path)))
        require_index_in(path.parent)  # elsewhere, the configuration is that of a subfolder


def require_places(files: list[str]) -> None:
    """Refuse shards of one folder that hold a tensor which their index says is in another of them: two of equal shape
    may have changed places.

    Raises:
        CheckpointError: names the tensor.
    """
    by_name = {Path(file).name: file for file in files}
    for index in sorted(Path(files[0]).parent.glob("*.safetensors.index*.json")) if len(files) > 1 else ():
        weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            continue  # of another variant: that of these files was looked at
        if set(weight_map.values()) != by_name.keys():
            continue
        for shard, file in by_name.items():
            stray = next((name for name in read_headers([file]) if weight_map.get(name, shard) != shard), None)
            if stray is not None:
                raise CheckpointError(
                    f"tensor {stray} is in {shard}, but {index} says {weight_map[stray]}: values may be exchanged; "
                    "fetch the checkpoint again"
                )


def require_index(model: str, *, subfolder: str = "", **source: Any) -> None:
    """The same of a folder or of a repository, of which only the index is fetched; `source` says how.

    A repository that cannot be read is no finding: loading it will say why.

    Raises:
        CheckpointError: it is not sound.
    """
    if is_folder(model):
        require_index_in(Path(model) / subfolder)
        return
    try:
        download = {name: source[name] for name in ("revision", "cache_dir") if name in source}
        path = hf_hub_download(model, INDEX, subfolder=subfolder or None, **download)
    except (OSError, HTTPError, ValueError):
        return
    _require_file(Path(path))


def _require_file(path: Path) -> None:
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than the {LARGEST_JSON} that are read")
    shards_of(path.read_bytes(), str(path))
