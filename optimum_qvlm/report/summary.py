"""The content of `qvlm_report.json`."""

import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from optimum_qvlm.pipeline.result import CalibrationResult
from optimum_qvlm.report.kept import kept_reasons
from optimum_qvlm.report.precision import scheme_of
from optimum_qvlm.version import __version__


def summarize(
    result: CalibrationResult,
    settings: dict[str, Any],
    *,
    bytes_before: int,
    bytes_after: int,
    source_bytes: int | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything a reader needs to judge a calibration, as plain JSON values.

    `fidelity` stays None: it can be measured once the model is whole.

    Args:
        result: of the calibration.
        settings: the configuration's own dict, of which only the settings are kept.
        bytes_before: of all parameters and buffers in memory, in full precision.
        bytes_after: the same, quantized.
        source_bytes: of the weight files of the full-precision checkpoint, None where they are not known.
        warnings: sentences that were said before the calibration.
    """
    schemes = Counter(scheme_of(module) for module in result.modules.values())
    recipe = {} if result.recipe is None else result.recipe.to_dict()
    versions = {
        "optimum_qvlm": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {
        "warnings": list(warnings),
        "settings": {name: value for name, value in settings.items() if name not in ("modules", "blocks")},
        "calibration": {"method": settings["method"], **recipe, "versions": versions},
        "seconds": round(result.seconds, 2),
        "linears_per_scheme": dict(schemes),
        "kept_in_full_precision": list(result.plan.kept),
        "kept_reasons": kept_reasons(result.plan, settings),
        "unused": [layer.name for layer in result.plan.unused],
        "folded_into_norms": result.folded,
        "bytes": {
            "before": bytes_before,
            "after": bytes_after,
            "ratio": round(bytes_before / bytes_after, 3),
            "source_files": source_bytes,
        },
        "fidelity": None,
        "threshold": result.plan.threshold,
        "dependency": [
            {"part": d.part, "layer": d.layer, "entropy": d.entropy, "marginal": d.marginal}
            for d in result.plan.dependencies
        ],
        "blocks": _blocks(result),
        "layers": [{"part": e.part, "layer": e.layer, "error": e.error} for e in result.layers],
        "encoder": None if result.encoder is None else result.encoder.to_dict(),
        "sites": [{"site": e.site, "nearest": e.nearest, "found": e.found, "chosen": e.chosen} for e in result.sites],
        "modules": {name: record.to_dict() for name, record in result.modules.items()},
    }


def _blocks(result: CalibrationResult) -> list[dict[str, Any]]:
    """The partition, with the joint search of each block where there was one."""
    searched = {error.block: error for error in result.joint}
    entries = []
    for block in result.plan.blocks:
        entry: dict[str, Any] = {"part": block.part, "first": block.first, "last": block.last}
        error = searched.get(block)
        if error is not None:
            entry |= {"before": error.before, "after": error.after, "forwards": error.forwards, "share": error.share}
            entry["seconds"] = round(error.seconds, 3)
        entries.append(entry)
    return entries
