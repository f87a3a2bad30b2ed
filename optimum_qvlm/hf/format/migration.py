"""Versions of the saved format: which are read, and how older ones become the current one."""

from collections.abc import Callable
from typing import Any

from optimum_qvlm.errors import ConfigError

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version -> what turns its `quantization_config` into that of the next version."""


def migrate(values: dict[str, Any], current: int) -> dict[str, Any]:
    """`quantization_config` in the current format, without its version.

    Raises:
        ConfigError: a version that is newer, or so old that no migration is left, or no version at all.
    """
    values = dict(values)
    version = values.pop("format_version", current)
    if not isinstance(version, int) or isinstance(version, bool) or version > current:
        raise ConfigError(
            f"the checkpoint has format version {version!r}, this release of optimum-qvlm reads up to {current}; "
            "upgrade it: pip install -U optimum-qvlm"
        )
    while version < current:
        if version not in MIGRATIONS:
            raise ConfigError(
                f"the checkpoint has format version {version}, which this release of optimum-qvlm does not read any "
                f"more (it reads {current}); quantize the model again, or load it with the release that wrote it"
            )
        values = MIGRATIONS[version](values)
        version += 1
    return values
