"""That a model and the files of a checkpoint hold the same tensors, so that no weight is left to chance."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from optimum_qvlm.compat.transformers import loaded_keys, missing_patterns, tied_keys, unexpected_patterns
from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.safetensors_files import Manifest

CLASS = "load it with the class that config.json names under architectures, or restore config.json"


def require_coverage(model: Any, stored: Manifest, ours: Iterable[str]) -> None:
    """Refuse a model, on the meta device, of which a parameter would not come from the files, or the reverse.

    `stored` are the tensors of the files, of which the names in `ours` lead to no parameter by design. A head that the
    requested class adds to the saved one may be new, and one that it leaves out unused; transformers reports both.

    Raises:
        CheckpointError: names the tensors.
    """
    names = stored.keys() - set(ours)
    state = model.state_dict(keep_vars=True)
    keys = loaded_keys(model, sorted(names), state)
    _require_shapes(state, stored, keys)
    given = {key for key, _ in keys.values()}
    absent = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter) and name not in given]
    missing = without_new_heads(model, _untied(model, absent, given), given)
    if missing:
        raise CheckpointError(
            f"config.json describes a {type(model).__name__} with {_listed(missing)}, which the checkpoint's files do "
            f"not hold; {CLASS}"
        )
    unused = _without_left_heads(model, (name for name in sorted(names) if keys[name][0] not in state))
    if unused:
        raise CheckpointError(
            f"the checkpoint's files hold {_listed(unused)}, for which the {type(model).__name__} that config.json "
            f"describes has no place; {CLASS}"
        )


def without_new_heads(model: Any, missing: Iterable[str], given: Iterable[str]) -> list[str]:
    """Those of the `missing` parameters that no head explains which this class adds to the one that was saved.

    A head is a module beside the base model of which no parameter is `given`. Those that the model says may be missing
    are left out too.
    """
    optional = [re.compile(pattern) for pattern in missing_patterns(model)]
    left = [name for name in missing if not any(pattern.search(name) for pattern in optional)]
    if model.base_model is model or type(model).__name__ in (model.config.architectures or ()):
        return left
    full = {name.partition(".")[0] for name in given} | {model.base_model_prefix}
    return [name for name in left if name.partition(".")[0] in full]


def _require_shapes(state: Mapping[str, Any], stored: Manifest, keys: Mapping[str, tuple[str, bool]]) -> None:
    for name, (key, converted) in keys.items():
        if key not in state or converted:
            continue
        shape, described = list(stored[name][1]), list(state[key].shape)
        if shape != described:
            raise CheckpointError(
                f"{name} has shape {shape} in the checkpoint, {described} in the model that config.json describes; "
                f"{CLASS}"
            )


def _untied(model: Any, missing: Iterable[str], given: set[str]) -> list[str]:
    """Without parameters that share one which is given."""
    groups: dict[str, set[str]] = {}
    for target, source in tied_keys(model).items():
        groups.setdefault(source, {source}).add(target)
    shared = {name for group in groups.values() if group & given for name in group}
    return [name for name in missing if name not in shared]


def _without_left_heads(model: Any, unused: Iterable[str]) -> list[str]:
    """Those of the `unused` tensors of a checkpoint that are not of a head which only the saved class has.

    Only the saved class says which of its tensors are its head's, so it is built, on the meta device. Buffers that
    older releases of transformers stored and newer ones compute are left out too.
    """
    ignored = (*unexpected_patterns(model), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
    left = [name for name in unused if not any(re.search(pattern, name) for pattern in ignored)]
    saved_class = _saved_class(model)
    if not left or saved_class is None:
        return left
    with torch.device("meta"):
        saved = saved_class(copy.deepcopy(model.config))
    if saved.base_model is saved:
        return left
    keys, base = loaded_keys(saved, left, saved.state_dict()), f"{saved.base_model_prefix}."
    return [name for name in left if keys[name][0].startswith(base)]


def _saved_class(model: Any) -> Any:
    """The class of transformers that config.json names, where it is another than the model's for the same config."""
    name = next(iter(model.config.architectures or ()), type(model).__name__)
    found = getattr(transformers, name, None) if isinstance(name, str) and name != type(model).__name__ else None
    return found if getattr(found, "config_class", None) is type(model.config) else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
