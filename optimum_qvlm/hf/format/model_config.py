"""The configuration that a model was saved with, recorded so that a later change of config.json is found."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.index import parse_json
from optimum_qvlm.hf.format.record import CalibrationRecord, config_digest, require_sealed

FREE = frozenset(
    (
        "_name_or_path",
        "auto_map",
        "bos_token_id",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "name_or_path",
        "problem_type",
        "quantization_config",
        "transformers_version",
        "transformers_weights",
        "use_cache",
    )
)
"""Fields that may differ from the save: none of them changes what a forward computes."""

_ABSENT = object()


def model_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a save records of the content of its config.json."""
    return {name: value for name, value in config.items() if name not in FREE}


def require_same_model(record: CalibrationRecord | None, loaded: Any, path: Path) -> None:
    """Refuse a config.json at `path` that describes another model than the one that was saved.

    Nothing in the weights tells an epsilon or an activation function that was changed. Only the file is looked at:
    settings that the user gave to `from_pretrained` hold. `loaded` is the configuration that transformers made of the
    file; values that mean the same to its class are the same. Files without the configuration in question, and records
    of before this was written, are passed over.

    Raises:
        CheckpointError: names the first field that differs; the record was changed itself.
    """
    if record is None or record.model_config is None or not path.is_file():
        return
    require_sealed(record)
    content = parse_json(path.read_bytes(), str(path))
    values = content.get("quantization_config")
    if not isinstance(values, dict) or config_digest(values) != record.found_digest:
        return
    try:
        difference = _first_difference(record.model_config, model_config_of(content), loaded)
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deep; fetch it again") from error
    if difference is not None:
        field, saved, read = difference
        raise CheckpointError(
            f"{path} says {field}={_shown(read)}, but the model was saved with {_shown(saved)}; restore config.json. "
            "A change that is meant is given to from_pretrained, and saved with the model"
        )


def _first_difference(saved: Mapping[str, Any], read: Mapping[str, Any], loaded: Any) -> tuple[str, Any, Any] | None:
    written = next(_differences(saved, read), None)
    if written is None or saved.get("model_type") != read.get("model_type"):
        return written
    config_class = type(loaded)  # releases of transformers leave different defaults out, and rename fields
    try:
        meant = [config_class.from_dict(copy.deepcopy(dict(values))).to_dict() for values in (saved, read)]
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError):
        return written  # no configuration of this class
    return next(_differences(*meant), None)


def _differences(saved: Mapping[str, Any], read: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, its value in `saved`, in `read`). Fields that the class does not declare count too: transformers reads
    some, as `sliding_window`, from any configuration that has them."""
    for name in (*saved, *(name for name in read if name not in saved)):
        if name in FREE:
            continue
        old, new = saved.get(name, _ABSENT), read.get(name, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{path}{name}.")
        elif not _is_same(old, new):
            yield f"{path}{name}", old, new


def _is_same(old: Any, new: Any) -> bool:
    return isinstance(old, bool) == isinstance(new, bool) and bool(old == new)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
