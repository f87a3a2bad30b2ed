"""What is private in transformers, or differs between its releases."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers import auto


def take_loading_attributes(config_class: type) -> None:
    """Have `from_pretrained` ask a configuration that it is given beside a quantized checkpoint.

    transformers asks for `get_loading_attributes()` only the classes of a closed tuple, and has no way to register
    one more. A second call changes nothing.
    """
    known = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if config_class not in known:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, config_class)


def loaded_keys(model: Any, tensors: Iterable[str], state: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Name of each tensor of a checkpoint -> the key of `state` that loading gives it to, and whether it is converted.

    A key that `state` lacks is one that loading calls unexpected. Converted tensors change their shape, or several
    make one. No public function of transformers says where a tensor goes, and the names in a model change between its
    releases, so this follows `convert_and_load_state_dict_in_model` step by step.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix, keys = model.base_model_prefix, {}
    for name in tensors:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        keys[name] = key, pattern is not None
    return keys


def saved_keys(model: Any, state: Mapping[str, Any]) -> list[str]:
    """The names under which `save_pretrained` writes the tensors of `state`, in its order, by default.

    Nothing public says so before the files are written. Each tensor is asked for alone, since converters may not.
    """
    return [next(iter(revert_weight_conversion(model, {key: tensor}))) for key, tensor in state.items()]
