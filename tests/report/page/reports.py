"""Reports for pages: one that has everything, one of an early release, and one with hostile content."""

from typing import Any

from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.spec import ActivationSpec, LinearFormat, WeightSpec

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJg"
    "gg=="
)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")

LOSSES = ("answer", "entropy", "vision", "final", "total")

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "\"><img src=x onerror='window.hacked = 1'>",
    "'><svg onload=window.hacked=1>",
    "</title></style></script><script>window.hacked = 1</script>",
    "javascript:window.hacked=1",
    "]]><!--",
    "\u202egnp.exe\x00\x1b[31m\ud800\ufffe",
    "数据 café 🦙",
    "x" * 100_000,
)
"""Names and answers that try to become more than text."""


def record(bits: int = 4, **format: Any) -> dict[str, Any]:
    """A module's entry."""
    grids = {"weight": WeightSpec(bits=bits, group=None if bits == 8 else 64), "activation": ActivationSpec(bits=8)}
    return ModuleRecord(
        in_features=128,
        out_features=128,
        bias=False,
        format=LinearFormat(**grids, **format),
        scale_dtype="float32",
        weight_clip=0.97,
        site="site",
    ).to_dict()


def full_report(layers: int = 3, vision: int = 2) -> dict[str, Any]:
    """What a calibration of a tower, a projector and a decoder writes, with every field."""
    modules = {f"tower.layers.{n}.{linear}": record(8) for n in range(vision) for linear in LINEARS}
    modules["projector.linear"] = record(8, equalized=True)
    modules |= {
        f"decoder.layers.{n}.{linear}": record(4, rotation=64, activation_clip=0.95)
        for n in range(layers)
        for linear in LINEARS
    }
    names = (
        [f"tower.layers.{n}" for n in range(vision)] + ["projector"] + [f"decoder.layers.{n}" for n in range(layers)]
    )
    parts = ["vision"] * vision + ["projector"] + ["language"] * layers
    return {
        "warnings": ["threshold has no effect: reasons"],
        "settings": {"scheme": "w4a8", "vision_scheme": "w8a8", "overrides": None},
        "calibration": {"method": "qvlm", "source": "packaged", "samples": 64, "seed": 0, "fingerprint": "ab" * 32,
                        "versions": {"torch": "2.13.0"}},
        "seconds": 95.2,
        "kept_in_full_precision": ["lm_head"],
        "kept_reasons": {"lm_head": "outside of the layers"},
        "unused": ["tower.layers.9"],
        "bytes": {"before": 8_000_000, "after": 2_000_000, "ratio": 4.0, "source_files": 8_100_000},
        "fidelity": {
            "prefill": {"tokens": 18, "mean_kl": 0.2, "top1_agreement": 0.9},
            "decode": {"tokens": 17, "mean_kl": 0.1, "top1_agreement": 0.95},
            "generate": {"answers": 2, "tokens": 9.0, "agreed_tokens": 4.5, "exact_match": 0.5},
            "samples": [
                {"prompt": "How many?", "reference": "three red cars", "answer": "three blue cars", "images": [PIXEL]},
                {"prompt": "Where?", "reference": "here", "answer": "here"},
            ],
        },
        "threshold": 2.4,
        "dependency": [
            {"part": part, "layer": n, "entropy": 2.0 + 0.1 * n, "marginal": n == 1}
            for part, count in (("vision", vision), ("language", layers))
            for n in range(count - 1)
        ],
        "blocks": [
            *({"part": "vision", "first": n, "last": n, "before": 1e-4, "after": 1e-4} for n in range(vision)),
            {"part": "projector", "first": 0, "last": 0, "before": 2e-4, "after": 1e-4, "seconds": 1.5},
            *({"part": "language", "first": n, "last": n, "before": 3e-3, "after": 2e-3} for n in range(layers)),
        ],
        "layers": [
            {"part": part, "layer": name, "error": 1e-4 * (n + 1)}
            for n, (part, name) in enumerate(zip(parts, names, strict=True))
        ],
        "encoder": {
            "losses": [dict.fromkeys(LOSSES, 1.0 / (n + 1)) for n in range(3)],
            "chosen_epoch": 2,
            "seconds": 12.5,
        },
        "sites": [{"site": f"{name}.site", "nearest": 1e-2, "found": 1e-3, "chosen": 2e-3} for name in names],
        "modules": modules,
    }  # fmt: skip


def early_report() -> dict[str, Any]:
    """The fields that the first release wrote."""
    report = full_report()
    for name in ("warnings", "kept_reasons", "encoder", "unused"):
        del report[name]
    report["fidelity"] = {"tokens": 100, "mean_kl": 0.01, "top1_agreement": 0.99}
    report["bytes"] = {"before": 8_000_000, "after": 2_000_000}
    return report


def hostile_report(text: str) -> dict[str, Any]:
    """Every text of a report, keys included, is `text` or holds it."""
    report = full_report()

    def spoiled(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return text
        if isinstance(value, list):
            return [spoiled(entry) for entry in value]
        if isinstance(value, dict):
            named = key in ("modules", "kept_reasons", "versions", "settings")
            return {f"{name}.{text}" if named else name: spoiled(entry, name) for name, entry in value.items()}
        return value

    return spoiled(report)
