"""What is private in accelerate, or is told by its pages but not promised. Nothing is imported until it is used."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from optimum_qvlm.compat.lookup import private

SEEN = "1.10 to 1.15"
"""Releases that have all of this."""

HOOK = "_hf_hook"
"""The attribute of a module that holds the hook which accelerate attached, and that no function asks for."""


def hook_of(module: nn.Module) -> Any:
    """The hook that accelerate attached to a module, None where there is none."""
    return getattr(module, HOOK, None)


def offloads(hook: Any) -> bool:
    """Whether a hook, or one that it holds, keeps the weights of its module elsewhere between calls."""
    return bool(getattr(hook, "offload", False)) or any(map(offloads, getattr(hook, "hooks", ())))


def attach_hook(module: nn.Module, hook: Any) -> Any:
    """The module with a hook that was taken from another one."""
    return private("accelerate.hooks.add_hook_to_module", SEEN)(module, hook)


def detach_hook(module: nn.Module) -> Any:
    """The module as it was before a hook was attached."""
    return private("accelerate.hooks.remove_hook_from_module", SEEN)(module)


def balanced_memory(model: nn.Module, limits: dict[Any, Any], unsplit: Sequence[str], *, low_zero: bool) -> Any:
    """Limits of memory for each device, so that a model is spread evenly; with `low_zero` the first gets little.

    transformers asks the same function for `device_map="balanced"`, and a quantized model has to be placed as it would.
    """
    balance = private("accelerate.utils.get_balanced_memory", SEEN)
    return balance(model, dict(limits), no_split_module_classes=list(unsplit), low_zero=low_zero)
