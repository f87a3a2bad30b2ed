"""What a quantized checkpoint holds, without its weights: from a folder, or from the Hub by a few small requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from optimum_qvlm.errors import CheckpointError, HubError
from optimum_qvlm.hf.config import QUANT_METHOD, QVLMConfig
from optimum_qvlm.hf.format.index import EXPLICIT, LARGEST_JSON, parse_json, require_inner_name, shards_of
from optimum_qvlm.hf.format.model_sizes import require_buildable
from optimum_qvlm.hf.format.modules import require_checkpoint, require_record
from optimum_qvlm.hf.format.safetensors_files import Manifest, merge_headers
from optimum_qvlm.hf.saving.source import is_folder
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE
from optimum_qvlm.report.figures import measured_layers
from optimum_qvlm.report.precision import PartRow, part_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A checkpoint whose configuration, record and tensor headers were found to fit together.

    Attributes:
        name: folder or repository; `commit` that of the latter.
        architecture: the class that config.json names.
        values: `quantization_config` as it is on disk.
        config: the same, read.
        rows: precision per part.
        report: content of `qvlm_report.json`, empty where there is none.
        files: bytes of each weight file.
    """

    name: str
    commit: str | None
    architecture: str
    values: Mapping[str, Any]
    config: QVLMConfig
    rows: list[PartRow]
    report: Mapping[str, Any]
    files: Mapping[str, int]


def inspect_checkpoint(name: str, *, revision: str | None = None, variant: str | None = None) -> Inspection:
    """Read and check `name`, a folder or a repository on the Hub.

    Raises:
        QVLMError: it is not there, not quantized by this package, or does not hold what it says.
    """
    place = _Folder(Path(name)) if is_folder(name) else _Repository(name, revision)
    config = _read_config(place)
    values = config["quantization_config"]
    read = QVLMConfig.from_dict(values)
    assert isinstance(read, QVLMConfig)
    shards = _shards(place, variant, config.get(EXPLICIT))
    record = place.require(read, shards)
    report = parse_json(place.read(REPORT_FILE) or b"{}", REPORT_FILE)
    architectures = config.get("architectures")
    return Inspection(
        name=name,
        commit=place.commit,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown",
        values=values,
        config=read,
        rows=part_rows(record.modules, record.manifest or {}, measured_layers(report)),
        report=report,
        files={shard: place.size(shard) for shard in shards},
    )


class _Folder:
    """Files of a local folder."""

    commit = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        if not path.is_file():
            return None
        if self.size(name) > LARGEST_JSON:
            raise CheckpointError(f"{path} has {self.size(name)} bytes, more than the {LARGEST_JSON} that are read")
        return path.read_bytes()

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def require(self, config: QVLMConfig, shards: list[str]) -> Any:
        return require_checkpoint(config, [str(self.folder / name) for name in shards])


class _Repository:
    """Files of a repository on the Hub, at the commit that its revision has now."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.api = name, HfApi()
        with _said(name):
            info = self.api.model_info(name, revision=revision, files_metadata=True)
        self.commit = info.sha
        self.sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def read(self, name: str) -> bytes | None:
        if not self.has(name):
            return None
        if self.size(name) > LARGEST_JSON:
            raise CheckpointError(f"{name} has {self.size(name)} bytes, more than the {LARGEST_JSON} that are read")
        with _said(self.name):
            return Path(self.api.hf_hub_download(self.name, name, revision=self.commit)).read_bytes()

    def has(self, name: str) -> bool:
        return name in self.sizes

    def size(self, name: str) -> int:
        return self.sizes[name]

    def require(self, config: QVLMConfig, shards: list[str]) -> Any:
        return require_record(config, merge_headers((shard, self._header(shard)) for shard in shards))

    def _header(self, shard: str) -> Manifest:
        with _said(self.name):
            state = self.api.parse_safetensors_file_metadata(self.name, shard, revision=self.commit)
        return {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in state.tensors.items()}


class _said:
    """Turns what the Hub's client raises into a `HubError` that names the repository."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, (OSError, HTTPError, ValueError)) and not isinstance(error, CheckpointError):
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise HubError(
                f"{self.name} is no folder here, and could not be read from the Hub ({reason}); check the name, and "
                "for a private model log in with `hf auth login` or set HF_TOKEN"
            ) from error


def _read_config(place: _Folder | _Repository) -> dict[str, Any]:
    data = place.read("config.json")
    if data is None:
        raise CheckpointError(f"{place.name} has no config.json; name the folder of a saved model")
    config = parse_json(data, "config.json")
    require_buildable(config, place.name)
    values = config.get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        method = values.get("quant_method") if isinstance(values, dict) else None
        state = "not quantized" if method is None else f"quantized with {str(method)[:40]!r}, not with {QUANT_METHOD!r}"
        raise CheckpointError(f"{place.name} is {state}; there is nothing to show")
    return config


def _shards(place: _Folder | _Repository, variant: str | None, explicit: object) -> list[str]:
    """Names of the weight files, as transformers picks them: `explicit`, which config.json may name, goes first."""
    middle = "" if variant is None else f".{variant}"
    single, index = f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"
    if isinstance(explicit, str):
        single = index = require_inner_name(explicit, "config.json")
    if place.has(single) and not single.endswith(".json"):
        return [single]
    data = place.read(index)
    if data is None:
        raise CheckpointError(f"{place.name} has neither {single} nor {index}; fetch it again")
    shards = shards_of(data, index)
    missing = next((shard for shard in shards if not place.has(shard)), None)
    if missing is not None:
        raise CheckpointError(f"{missing}, which {index} names, is missing; fetch it again")
    return shards
