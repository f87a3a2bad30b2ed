"""Arguments of `QVLMConfig` that moved: still taken, with a warning that names where they are now."""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.settings import NESTED, nested_names

EXACT_DECODE = "exact_decode"
"""True is `decode_tokens=0` today."""

Options = TypeVar("Options")


def move_deprecated(settings: dict[str, Any], nested: Mapping[str, dict[str, Any]]) -> None:
    """Move flat arguments of before from `settings` into `nested`, with one warning at the line of the user.

    To be called by what the user calls.

    Raises:
        ConfigError: `exact_decode` is no boolean.
    """
    moved = []
    for name, (argument, own) in nested_names(former=True).items():
        if name in settings:
            nested[argument][own] = settings.pop(name)
            moved.append(f"{name} is {argument}={NESTED[argument].__name__}({own}=...)")
    if EXACT_DECODE in settings:
        exact = settings.pop(EXACT_DECODE)
        if not isinstance(exact, bool):
            raise ConfigError(f"{EXACT_DECODE} must be True or False, got {exact!r}")
        if exact:
            settings["decode_tokens"] = 0
        moved.append(f"{EXACT_DECODE}=True is decode_tokens=0")
    if moved:
        text = f"settings of QVLMConfig have moved and will be refused some day: now {'; '.join(moved)}"
        warnings.warn(text, DeprecationWarning, stacklevel=3)


def as_fields(options: Any, made: type) -> dict[str, Any]:
    """Fields that `options` asks for: those of a dict, or what differs from the defaults of an instance of `made`.

    Raises:
        ConfigError: it is neither.
    """
    if options is None:
        return {}
    if isinstance(options, made):
        values = [(entry, getattr(options, entry.name)) for entry in fields(made)]
        return {entry.name: value for entry, value in values if value != entry.default}
    if isinstance(options, Mapping):
        return dict(options)
    raise ConfigError(f"expected {made.__name__} or a dict with some of its fields, got {options!r}")


def made_of(made: type[Options], values: Mapping[str, Any]) -> Options:
    """An instance with these fields.

    Raises:
        ConfigError: there is no such field, or its value is not valid.
    """
    known = [entry.name for entry in fields(made)]  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in set(values) - set(known))
    if unknown:
        raise ConfigError(f"{made.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    return made(**values)
