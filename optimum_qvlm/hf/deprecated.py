"""Arguments of `QVLMConfig` that moved: still taken, with a warning that names where they are now."""

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.settings import NESTED, nested_names

EXACT_DECODE = "exact_decode"
"""True is `decode_tokens=0` today."""

EXACT_DECODE_NOW = f"{EXACT_DECODE}=True is decode_tokens=0"

Options = TypeVar("Options")


def move_deprecated(settings: dict[str, Any], nested: Mapping[str, dict[str, Any]]) -> None:
    """Move flat arguments of before from `settings` into `nested`, with one warning at the line of the user.

    To be called by what the user calls.

    Raises:
        ConfigError: `exact_decode` is no boolean, or a setting is given under both its names.
    """
    moved = []
    for name, (argument, own) in nested_names(former=True).items():
        if name in settings:
            now = f"{argument}={NESTED[argument].__name__}({own}=...)"
            if own in nested[argument]:
                raise ConfigError(f"{name} and {now} are the same setting; give one of them, best the second")
            nested[argument][own] = settings.pop(name)
            moved.append(f"{name} is {now}")
    if EXACT_DECODE in settings:
        if _is_exact(settings.pop(EXACT_DECODE)):
            settings["decode_tokens"] = 0
        moved.append(EXACT_DECODE_NOW)
    if moved:
        text = f"settings of QVLMConfig have moved and will be refused some day: now {'; '.join(moved)}"
        warnings.warn(text, DeprecationWarning, stacklevel=3)


class FormerNames:
    """Attributes that moved, read and assigned under their names of before with a warning.

    What is assigned to `search` and `encoder` becomes an instance of their classes.
    """

    def __getattr__(self, name: str) -> Any:
        argument, own = nested_names(former=True).get(name, ("", ""))
        if argument in vars(self):
            _warn(f"{name} is read as {argument}.{own} now")
            return getattr(vars(self)[argument], own)
        if name == EXACT_DECODE and "decode_tokens" in vars(self):
            _warn(EXACT_DECODE_NOW)
            return vars(self)["decode_tokens"] == 0
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NESTED:
            value = made_of(NESTED[name], as_fields(value, NESTED[name]))
        elif name in nested_names(former=True):
            argument, own = nested_names(former=True)[name]
            _warn(f"{name} is {argument}.{own} now: {argument} = {NESTED[argument].__name__}({own}=...)")
            name, value = argument, replace(getattr(self, argument), **{own: value})
        elif name == EXACT_DECODE:
            exact = _is_exact(value)
            _warn(EXACT_DECODE_NOW)
            if not exact:
                return
            name, value = "decode_tokens", 0
        super().__setattr__(name, value)


def _warn(text: str) -> None:
    """At the line that reads or assigns the attribute."""
    warnings.warn(text, DeprecationWarning, stacklevel=3)


def _is_exact(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{EXACT_DECODE} must be True or False, got {value!r}")
    return value


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
