"""Why linears stay in full precision."""

from collections.abc import Mapping
from typing import Any

from optimum_qvlm.pipeline.options import keeps, matches
from optimum_qvlm.plan import QuantPlan

OUTSIDE = "outside of the layers that are quantized; an override can name an output embedding"
VISION = "vision_scheme is None"


def kept_reasons(plan: QuantPlan, settings: Mapping[str, Any]) -> dict[str, str]:
    """One sentence for each linear that `plan` keeps, by name. `settings` are those that were asked for."""
    layers = {layer.name: part.vision for part in plan.parts for layer in part.layers}
    return {name: _reason(name, layers, settings) for name in plan.kept}


def _reason(name: str, layers: Mapping[str, bool], settings: Mapping[str, Any]) -> str:
    overrides = settings.get("overrides") or {}
    pattern = next((pattern for pattern in overrides if matches(pattern, name)), None)
    if pattern is not None:
        return f"overrides keeps {pattern!r}"
    pattern = next((p for p in settings.get("modules_to_not_convert") or () if keeps(p, name)), None)
    if pattern is not None:
        return f"modules_to_not_convert names {pattern!r}"
    layer = next((layer for layer in layers if name == layer or name.startswith(f"{layer}.")), None)
    if layer is not None and layers[layer] and settings.get("vision_scheme") is None:
        return VISION
    return OUTSIDE if layer is None else "no linear of its layer that calibration reaches"
