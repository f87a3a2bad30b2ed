"""The saved outcome of a calibration, and what ties it to the weights beside it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optimum_qvlm.errors import CheckpointError, ConfigError, SpecError
from optimum_qvlm.files import strict_json
from optimum_qvlm.hf.format.entries import require_entries
from optimum_qvlm.plan import ModuleRecord

SEALS = ("manifest", "model_config", "digest")
"""What a save adds to the record once the files are written: it says how these belong together."""


@dataclass(slots=True, kw_only=True)
class CalibrationRecord:
    """The saved outcome of a calibration.

    Attributes:
        modules: what each quantized linear got, by the name of its tensors on disk.
        blocks: the partition.
        calibration: data fingerprint, sample count, seed, package versions.
        manifest: name -> [dtype, shape] of every tensor as written; set when a checkpoint is saved.
        model_config: what config.json says of the model, see `model_config_of`; set when a checkpoint is saved.
        digest: SHA-256 over the rest of the saved configuration; set when a checkpoint is saved.
        found_digest: the same, computed over the configuration that was read.
        found_identity: `config_identity` of the configuration that was read.
    """

    modules: dict[str, ModuleRecord]
    blocks: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    model_config: dict[str, Any] | None = None
    digest: str | None = None
    found_digest: str | None = None
    found_identity: str | None = None


def read_record(values: Mapping[str, Any]) -> CalibrationRecord:
    """The results in a saved quantization_config.

    Raises:
        ConfigError: they are not whole.
    """
    require_entries(values)
    try:
        modules = {name: _read_entry(name, entry) for name, entry in values["modules"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the modules of quantization_config are not whole ({error}); fetch the checkpoint again"
        ) from error
    return CalibrationRecord(
        modules=modules,
        blocks=list(values.get("blocks", [])),
        calibration=dict(values.get("calibration", {})),
        manifest=values.get("manifest"),
        model_config=values.get("model_config"),
        digest=values.get("digest"),
    )


def _read_entry(name: str, entry: Mapping[str, Any]) -> ModuleRecord:
    try:
        return ModuleRecord.from_dict(entry)
    except SpecError as error:
        raise ConfigError(f"{name}: its entry in quantization_config is not valid: {error}") from error


def rename_modules(record: CalibrationRecord, names: Mapping[str, str]) -> None:
    """Call every module, and the site that it belongs to, by another name."""
    record.modules = {
        names[name]: replace(entry, site=names.get(entry.site, entry.site)) for name, entry in record.modules.items()
    }


def require_sealed(record: CalibrationRecord | None) -> CalibrationRecord:
    """The record, if a save wrote it whole and nothing of the configuration was changed since.

    Raises:
        CheckpointError: it is not there, or digest and content differ.
    """
    if record is None or record.manifest is None or record.digest is None:
        raise CheckpointError(
            "quantization_config has no record of a finished calibration (modules, manifest, digest); the folder was "
            "not written by save_pretrained of a quantized model"
        )
    if record.digest != record.found_digest:
        raise CheckpointError(
            f"quantization_config was changed after saving (digest {record.digest}, content {record.found_digest}); "
            "restore config.json, or quantize again with other settings"
        )
    return record


def config_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 over a saved quantization_config without its own digest, in canonical JSON."""
    return _sha256({name: value for name, value in values.items() if name != "digest"})


def config_identity(values: Mapping[str, Any]) -> str:
    """SHA-256 over settings and results alone: it stands beside the weights, so that files of two saves do not mix."""
    return _sha256({name: value for name, value in values.items() if name not in SEALS})


def _sha256(values: Mapping[str, Any]) -> str:
    try:
        text = strict_json.dumps(values, sort_keys=True, separators=(",", ":"))
    except ValueError as error:
        raise ConfigError(f"quantization_config is not whole ({error}); fetch the checkpoint again") from error
    return hashlib.sha256(text.encode()).hexdigest()
