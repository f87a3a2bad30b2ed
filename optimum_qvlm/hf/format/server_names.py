"""Names of tensors as servers look for them, which are those of older releases of transformers."""

import re
from collections.abc import Mapping
from typing import Any

NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Vision towers whose tensors lay in a module `vision_model` until transformers 5.17, and lie in it for servers."""

TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
NESTED = r"\1vision_model."


def has_nested_tower(config: Mapping[str, Any]) -> bool:
    """Whether `server_name` changes names of a model with this config.json."""
    vision = config.get("vision_config")
    return isinstance(vision, Mapping) and vision.get("model_type") in NESTED_TOWERS


def server_name(name: str, config: Mapping[str, Any]) -> str:
    """The name that servers know a module or tensor of a checkpoint by.

    Args:
        name: as it is on disk.
        config: the content of config.json.
    """
    return TOWER.sub(NESTED, name) if has_nested_tower(config) else name
