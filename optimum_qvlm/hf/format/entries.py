"""Types and ranges of what `quantization_config` records, checked before anything is built from it."""

import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.plan import RECORD_TYPES

LARGEST = 2**31 - 1
"""No size of a linear or tensor is above; larger ones would overflow or exhaust memory before they are compared."""

LARGEST_ROTATION = 1024
"""Channels of a Hadamard block, of which a matrix is made."""

SCALE_DTYPES = ("float32", "float16", "bfloat16")
SEAL_TYPES: dict[str, tuple[type, str]] = {
    "manifest": (Mapping, "a dict of tensors"),
    "model_config": (Mapping, "a dict of fields"),
    "digest": (str, "a text"),
}


def require_entries(values: Mapping[str, Any]) -> None:
    """Refuse results that no save wrote.

    Raises:
        ConfigError: names the entry, its value and what is expected.
    """
    modules = values.get("modules")
    for name, entry in modules.items() if isinstance(modules, Mapping) else ():  # others are no records at all
        if isinstance(entry, Mapping):
            _require_module(name, entry)
    _require_blocks(values.get("blocks", []))
    if not isinstance(values.get("calibration", {}), Mapping):
        raise _bad("calibration", values["calibration"], "a dict")
    for name, (kind, expected) in SEAL_TYPES.items():
        if values.get(name) is not None and not isinstance(values[name], kind):
            raise _bad(name, values[name], expected)
    for name, entry in (values.get("manifest") or {}).items():
        if not _is_tensor_entry(entry):
            raise _bad(f"manifest[{name}]", entry, f"[dtype, [sizes of 0..{LARGEST}]]")


def _require_module(name: str, entry: Mapping[str, Any]) -> None:
    for field, value in entry.items():
        kinds = _kinds(RECORD_TYPES.get(field))
        if kinds and not any(_is(value, kind) for kind in kinds):
            shown = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise _bad(f"modules[{name}].{field}", value, f"{shown} (integers up to {LARGEST}, finite numbers)")
    for field in ("in_features", "out_features"):
        if entry.get(field) == 0:
            raise _bad(f"modules[{name}].{field}", 0, "a positive integer")
    if entry.get("scale_dtype", "float32") not in SCALE_DTYPES:
        raise _bad(f"modules[{name}].scale_dtype", entry["scale_dtype"], " or ".join(SCALE_DTYPES))
    rotation = entry.get("rotation")
    if rotation is not None and (rotation.bit_count() != 1 or rotation > LARGEST_ROTATION):
        raise _bad(f"modules[{name}].rotation", rotation, f"null or a power of two up to {LARGEST_ROTATION}")
    for field in ("activation_clip", "weight_clip"):
        if entry.get(field, 1) <= 0:
            raise _bad(f"modules[{name}].{field}", entry[field], "a positive number")


def _require_blocks(blocks: Any) -> None:
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise _bad("blocks", blocks, "a list of dicts")


def _is_tensor_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        return False
    sizes = entry[1]
    return isinstance(sizes, list) and len(sizes) <= 8 and all(_is(size, int) for size in sizes)


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The plain types of an annotation; empty for others, which are not checked here."""
    kinds = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    return kinds if all(kind in (int, float, bool, str, type(None)) for kind in kinds) else ()


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= LARGEST and math.isfinite(value)
    return isinstance(value, kind)


def _bad(where: str, value: Any, expected: str) -> ConfigError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ConfigError(f"{where} of quantization_config is {shown}, expected {expected}; fetch the checkpoint again")
