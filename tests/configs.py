"""Configurations for tests that name settings of `search` and `encoder` flat, as config.json does."""

from typing import Any

from optimum_qvlm import QVLMConfig
from optimum_qvlm.settings import nested_names


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `QVLMConfig`, with settings of `search` and `encoder` in dicts of their own."""
    names, arguments = nested_names(), dict(settings)
    for flat in names.keys() & settings.keys():
        argument, own = names[flat]
        arguments[argument] = {**arguments.get(argument, {}), own: arguments.pop(flat)}
    return arguments


def make_config(scheme: str = "w4a8", **settings: Any) -> QVLMConfig:
    """`QVLMConfig` with flat settings."""
    return QVLMConfig(scheme, **nested(settings))


def make_paper(bits: int = 4, **settings: Any) -> QVLMConfig:
    """`QVLMConfig.paper` with flat settings."""
    return QVLMConfig.paper(bits, **nested(settings))
