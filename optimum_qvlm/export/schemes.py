"""The record of a calibration as the `quantization_config` of compressed-tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.spec import Scheme

INTS, PACKED = "int-quantized", "pack-quantized"
"""Formats of compressed-tensors: codes as int8, or packed into int32."""

MIXED = "mixed-precision"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that servers make one of, in which all have one scheme."""

SHOWN = 5


def require_expressible(modules: Mapping[str, ModuleRecord], tensors: Iterable[str]) -> None:
    """Refuse what compressed-tensors has no words for, or its servers no kernels.

    Args:
        modules: the record, by names on disk.
        tensors: names of all tensors of the checkpoint.

    Raises:
        ConfigError: names modules, and says what to do.
    """
    reasons = {name: reason for name, entry in modules.items() if (reason := _inexpressible(entry)) is not None}
    if reasons:
        listed = [f"{name} {reason}" for name, reason in list(reasons.items())[:SHOWN]]
        more = f" and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        raise ConfigError(
            f"compressed-tensors cannot express {len(reasons)} of {len(modules)} modules: {', '.join(listed)}{more}; "
            "quantize with servable=True, or serve the model as it is by the plugin for vLLM"
        )
    _require_uniform(modules, {tensor.removesuffix(".weight") for tensor in tensors if tensor.endswith(".weight")})


def format_for(entry: ModuleRecord) -> str:
    """The format that holds a linear: servers know int8 products by `int-quantized`."""
    return INTS if str(Scheme.of(entry.weight, entry.activation)) == "w8a8" else PACKED


def quantization_config(modules: Mapping[str, ModuleRecord], names: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """What config.json says.

    Args:
        modules: the record, by names on disk.
        names: all names that programs know each of them by.

    Returns:
        JSON values: one group for each scheme, with the modules that have it by name.
    """
    groups: list[dict[str, Any]] = []
    for name, entry in modules.items():
        scheme = _scheme(entry)
        group = next((group for group in groups if scheme.items() <= group.items()), None)
        if group is None:
            groups.append(group := {**scheme, "targets": []})
        group["targets"].extend(dict.fromkeys(names[name]))
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(entry: ModuleRecord) -> dict[str, Any]:
    grouped = entry.weight.group is not None
    weights: dict[str, Any] = {"num_bits": entry.weight.bits, "symmetric": entry.weight.symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": entry.weight.group} if grouped else {"strategy": "channel"}
    activations: dict[str, Any] | None = None
    grid = entry.activation
    if grid is not None:
        activations = {"num_bits": grid.bits, "symmetric": True, "dynamic": not grid.static}
        if grid.static:
            activations |= {"strategy": "tensor"}
        elif grid.group is None:
            activations |= {"strategy": "token"}
        else:
            activations |= {"strategy": "group", "group_size": grid.group}
        activations |= {"type": "int"}
    return {
        "format": format_for(entry),
        "weights": weights | {"type": "int"},
        "input_activations": activations,
        "output_activations": None,
    }


def _inexpressible(entry: ModuleRecord) -> str | None:
    if entry.format.rotation is not None:
        return f"(its activations are rotated in blocks of {entry.format.rotation})"
    if entry.format.equalized:
        return "(its activations are equalized)"
    if entry.activation is not None and entry.activation.fitted:
        return "(the scales of its activations are fitted)"
    if entry.activation is not None and not entry.activation.static and entry.format.activation_clip != 1.0:
        return f"(its activations are clipped at {entry.format.activation_clip:g} of their peak)"
    return None


def _require_uniform(modules: Mapping[str, ModuleRecord], stored: set[str]) -> None:
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for fused in FUSED:
            parts = [f"{parent}.{part}" for part in fused if leaf == fused[0]]
            present = [part for part in parts if part in modules or part in stored]
            schemes = [_scheme(modules[part]) if part in modules else None for part in present]
            if any(scheme != schemes[0] for scheme in schemes):
                raise ConfigError(
                    f"{', '.join(present)} are one linear to servers, and do not have one scheme; quantize them alike, "
                    "or serve the model as it is by the plugin for vLLM"
                )
