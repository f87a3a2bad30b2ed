"""Names of modules on disk against names at run time, through transformers' own key mapping."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def runtime_modules(model: Any, disk_names: Iterable[str], tensor: str = "weight") -> dict[str, str]:
    """Run-time path of each module that `disk_names` names (`X` for tensors `X.weight`, ...).

    `tensor` is one that each of the modules has at the time, since the mapping looks at the model's own keys:
    `"weight_packed"` once they are quantized. Names that lead to no linear are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = dict(model.state_dict())
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for name in disk_names:
        key, _ = rename_source_key(f"{name}.{tensor}", renamings, converters, model.base_model_prefix, state)
        path = key.removesuffix(f".{tensor}")
        if path in linears:
            found[name] = path
    return found


def disk_names_of_linears(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Disk name of every linear of `model`, given the tensor names of its checkpoint, by run-time path.

    A linear that the checkpoint does not store under a name of its own (a tied output embedding, say) keeps
    its run-time name.
    """
    stored = runtime_modules(model, (t.removesuffix(".weight") for t in tensors if t.endswith(".weight")))
    by_path = {path: name for name, path in stored.items()}
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {path: by_path.get(path, path) for path in linears}
