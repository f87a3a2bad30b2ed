"""Names of modules on disk against names at run time, through transformers' own key mapping."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from optimum_qvlm.compat.transformers import loaded_keys, saved_keys


def runtime_modules(model: Any, disk_names: Iterable[str], tensor: str = "weight") -> dict[str, str]:
    """Run-time path of each module that `disk_names` names (`X` for tensors `X.weight`, ...).

    `tensor` is one that each of the modules has at the time, since the mapping looks at the model's own keys:
    `"weight_packed"` once they are quantized. Names that lead to no linear are left out.
    """
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    keys = loaded_keys(model, (f"{name}.{tensor}" for name in disk_names), dict(model.state_dict()))
    paths = {name.removesuffix(f".{tensor}"): key.removesuffix(f".{tensor}") for name, (key, _) in keys.items()}
    return {name: path for name, path in paths.items() if path in linears}


def disk_names_of_linears(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Disk name of every linear of `model`, given the tensor names of its checkpoint, by run-time path.

    A linear that the checkpoint does not store under a name of its own (a tied output embedding, say) keeps
    its run-time name.
    """
    stored = runtime_modules(model, (t.removesuffix(".weight") for t in tensors if t.endswith(".weight")))
    by_path = {path: name for name, path in stored.items()}
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {path: by_path.get(path, path) for path in linears}


def written_names(model: Any, paths: Mapping[str, str], *, original_format: bool) -> dict[str, str]:
    """Name that each module has in the files that `save_pretrained` is about to write.

    `paths` are run-time paths by the name on record. The two names differ where the class that was loaded is a part of
    the one that was saved, as with `AutoModel`, and without `original_format`, which writes run-time paths.
    """
    if not original_format:
        return dict(paths)
    state = {f"{path}.weight_packed": torch.empty(0, device="meta") for path in paths.values()}
    return dict(zip(paths, (key.removesuffix(".weight_packed") for key in saved_keys(model, state)), strict=True))
