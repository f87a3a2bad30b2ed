"""JSON as the standard has it: without NaN and infinite numbers, which Python reads and writes by default."""

import json
from typing import Any, NoReturn


def dumps(value: Any, **layout: Any) -> str:
    """JSON text; `layout` are options of `json.dumps`.

    Raises:
        ValueError: a number is NaN or infinite, or the value is nested too deep.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def as_file(value: Any) -> bytes:
    """The content of a file as transformers writes config.json: indented, and sorted by name.

    Raises:
        ValueError: as `dumps`.
    """
    return (dumps(value, indent=2, sort_keys=True) + "\n").encode()


def loads(data: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, holds NaN or an infinite number, or is nested too deep.
    """
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number of JSON")
