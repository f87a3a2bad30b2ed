"""Fusing the linears of a loaded model that read the same tensor, and undoing it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.utils import logging

from optimum_qvlm.compat.accelerate import attach_hook, detach_hook, hook_of, offloads
from optimum_qvlm.compat.transformers import has_adapters, parallel_size
from optimum_qvlm.errors import ConfigError
from optimum_qvlm.hf.format.modules import quantized_modules
from optimum_qvlm.hf.format.names import runtime_modules
from optimum_qvlm.hf.format.record import CalibrationRecord
from optimum_qvlm.hf.memory import return_freed_memory
from optimum_qvlm.modules.fused import FusedLinear, fuse, why_apart
from optimum_qvlm.modules.swap import replace_module

logger = logging.get_logger("transformers.optimum_qvlm")

FUSED_ON = ("cuda",)
"""Device types on which `from_pretrained` fuses: elsewhere a call costs little beside its product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What became of the sites with more than one quantized linear.

    Attributes:
        groups: paths of the linears that share one product now.
        apart: why the others do not, by their paths.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    apart: Mapping[tuple[str, ...], str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for each outcome."""
        lines = [f"{sum(map(len, self.groups))} linears were fused into {len(self.groups)} products"]
        reasons: dict[str, list[tuple[str, ...]]] = {}
        for paths, reason in self.apart.items():
            reasons.setdefault(reason, []).append(paths)
        for reason, left in reasons.items():
            lines.append(f"{len(left)} groups were not fused, as {', '.join(left[0])}: {reason}")
        return "\n".join(lines)


def fuse_linears(model: Any) -> Fusion:
    """Let the quantized linears of each site, as query, key and value, share one product.

    The model computes the same with fewer, larger kernels, and is saved as before. Linears that cannot be fused stay
    as they are; what became of which is logged and returned.

    Raises:
        ConfigError: the model was not quantized by this package, is offloaded, split by tensor parallelism, or has
            adapters.

    Example:
        >>> print(fuse_linears(model))  # doctest: +SKIP
        384 linears were fused into 136 products
    """
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    record = getattr(config, "record", None)
    if record is None:
        raise ConfigError(
            f"{type(model).__name__} was not quantized with QVLMConfig, so that nothing of it can be fused; pass the "
            "model that from_pretrained returned"
        )
    _refuse_adapters(model)  # they change names
    return _logged(fuse_sites(model, _sites_of(model, record)))


def fuse_where_it_pays(model: Any, record: CalibrationRecord) -> Fusion | None:
    """As `fuse_linears`, of a model that `from_pretrained` is about to return; None where nothing was tried.

    Nothing is tried unless all quantized linears are on devices of `FUSED_ON` or offloaded. A model of which some are
    offloaded stays as it is, and the reason is logged.
    """
    devices = {linear.weight_packed.device.type for linear in quantized_modules(model).values()} - {"meta"}
    if not devices or not devices.issubset(FUSED_ON):
        return None
    try:
        fusion = fuse_sites(model, _sites_of(model, record))
    except ConfigError as error:
        logger.warning(f"linears that read the same tensor were not fused, which would decode faster: {error}")
        return None
    logger.info(f"{fusion}; optimum_qvlm.unfuse_linears(model) undoes it")
    return fusion


def _sites_of(model: Any, record: CalibrationRecord) -> Iterable[Iterable[str]]:
    sites: dict[str, list[str]] = {}
    for name, path in runtime_modules(model, record.modules, "weight_packed").items():
        sites.setdefault(record.modules[name].site, []).append(path)
    return sites.values()


def _logged(fusion: Fusion) -> Fusion:
    (logger.warning if fusion.apart or not fusion.groups else logger.info)(str(fusion))
    return fusion


def fuse_sites(model: Any, sites: Iterable[Iterable[str]]) -> Fusion:
    """As `fuse_linears`, of quantized linears whose paths are given: each site has those that read one tensor.

    Raises:
        ConfigError: the model is offloaded, split by tensor parallelism, or has adapters.
    """
    _refuse_adapters(model)
    _refuse_split(model)
    _refuse_offload(model)
    order = list(quantized_modules(model))
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    groups, apart = [], {}
    for site in sites:
        members = set(site)
        paths = tuple(path for path in order if path in members)
        if len(paths) < 2:
            continue
        reason = _fuse_site(model, paths, places)
        if reason is None:
            groups.append(paths)
        else:
            apart[paths] = reason
    return_freed_memory()
    return Fusion(groups=tuple(groups), apart=apart)


def unfuse_linears(model: nn.Module) -> None:
    """Undo `fuse_linears`: each linear has its own weight again, bit for bit."""
    for path, linear in quantized_modules(model).items():
        if isinstance(linear, FusedLinear):
            alone, hook = linear.apart(), hook_of(linear.joint)
            replace_module(model, path, alone if hook is None else attach_hook(alone, hook))


def _fuse_site(model: nn.Module, paths: tuple[str, ...], places: Mapping[int, int]) -> str | None:
    """Replace the linears of a site, so that what they held is let go before the next; or say why not.

    A hook that takes their input to their device goes on with the joint weight.
    """
    linears: list[Any] = [model.get_submodule(path) for path in paths]
    fused = [linear for linear in linears if isinstance(linear, FusedLinear)]
    if fused:
        together = len(fused) == len(linears) and len({id(linear.joint) for linear in fused}) == 1
        return None if together else "some of them are fused already"
    if len({path.rpartition(".")[0] for path in paths}) > 1:
        return "they are in several modules"
    if any(places[id(linear)] > 1 for linear in linears):
        return "the model has one of them in several places"
    reason = why_apart(linears)
    if reason is not None:
        return reason
    hook = hook_of(linears[0])
    joined = fuse([detach_hook(linear) for linear in linears])
    if hook is not None:
        attach_hook(joined[0].joint, hook)
    for path, linear in zip(paths, joined, strict=True):
        replace_module(model, path, linear)
    return None


def _refuse_adapters(model: nn.Module) -> None:
    loaded = has_adapters(model) or getattr(model, "peft_config", None) is not None
    path = next((path for path, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if loaded or path is not None:
        where = "" if path is None else f" (at {path})"
        raise ConfigError(f"the model has adapters{where}; unload them, fuse, and add them again")


def _refuse_split(model: nn.Module) -> None:
    """Tensor parallelism gives each device rows or columns of a linear."""
    split = next((name for name, tensor in model.named_parameters() if hasattr(tensor, "device_mesh")), None)
    if split is None and parallel_size(model) > 1:
        split = "the model"
    if split is not None:
        raise ConfigError(f"{split} is split over a device mesh, where linears cannot be fused; load without tp_plan")


def _refuse_offload(model: nn.Module) -> None:
    hooked = (path for path, module in model.named_modules() if offloads(hook_of(module)))
    path = next(hooked, None)
    if path is None:
        path = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if path is not None:
        raise ConfigError(
            f"{path or 'the model'} is offloaded or not loaded, so that linears cannot be fused; load the model with a "
            "device_map that keeps it in memory"
        )
