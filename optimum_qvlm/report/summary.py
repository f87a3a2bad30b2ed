"""The content of `qvlm_report.json`."""

import platform
from collections import Counter
from typing import Any

import torch
import transformers

from optimum_qvlm.pipeline.result import CalibrationResult
from optimum_qvlm.version import __version__


def summarize(
    result: CalibrationResult, settings: dict[str, Any], *, bytes_before: int, bytes_after: int
) -> dict[str, Any]:
    """Everything a reader needs to judge a calibration, as plain JSON values.

    `settings` is the configuration's own dict, of which only the settings are kept; `bytes_*` count all
    parameters and buffers in memory.
    """
    schemes = Counter(f"w{m.weight_bits}a{m.activation_bits or 16}" for m in result.modules.values())
    recipe = {} if result.recipe is None else result.recipe.to_dict()
    versions = {
        "optimum_qvlm": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {
        "settings": {name: value for name, value in settings.items() if name not in ("modules", "blocks")},
        "calibration": {"method": settings["method"], **recipe, "versions": versions},
        "seconds": round(result.seconds, 2),
        "linears_per_scheme": dict(schemes),
        "kept_in_full_precision": list(result.plan.kept),
        "unused": [layer.name for layer in result.plan.unused],
        "bytes": {
            "before": bytes_before,
            "after": bytes_after,
            "ratio": round(bytes_before / bytes_after, 3),
        },
        "layers": [{"part": e.part, "layer": e.layer, "error": e.error} for e in result.layers],
        "sites": [{"site": e.site, "nearest": e.nearest, "found": e.found} for e in result.sites],
        "modules": {name: record.to_dict() for name, record in result.modules.items()},
    }
