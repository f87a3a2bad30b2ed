"""Sizes that a model's config.json claims, looked at before anything is built from them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from optimum_qvlm.errors import CheckpointError

MOST_PARTS = 10_000
"""Layers or experts of a model; each is a module, so more of them exhaust memory before a weight is read."""

LARGEST_SIZE = 2**31 - 1
"""Of one dimension."""

_PARTS = re.compile(r"(^|_)(layers?|depths?|blocks|stages|experts)$")
_SIZES = re.compile(r"_(size|dim|channels|heads)$")


def require_buildable(values: Mapping[str, Any], name: str) -> None:
    """Refuse counts of layers and experts, and sizes, that no model has. `values` is the content of config.json.

    Raises:
        CheckpointError: names the field, its value and the limit.
    """
    for field, value in _integers(values):
        limit = MOST_PARTS if _PARTS.search(field) else LARGEST_SIZE if _SIZES.search(field) else None
        if limit is not None and value > limit:
            shown = str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"
            raise CheckpointError(
                f"config.json of {name} claims {field}={shown}, above {limit}; it is damaged: fetch it again"
            )


def _integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every integer in nested objects, and in lists of them, under its own name; without recursion."""
    waiting: list[tuple[str, Any]] = list(values.items())
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.items())
        elif isinstance(value, list | tuple):
            waiting.extend((field, item) for item in value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(field), value
