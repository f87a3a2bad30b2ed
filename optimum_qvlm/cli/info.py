"""What `optimum-cli qvlm info` does: check a checkpoint and print what it consists of."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from optimum_qvlm.cli.outcome import finish, print_json, say
from optimum_qvlm.hf.format.inspection import Inspection, inspect_checkpoint
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.report.figures import fidelity_figures, folded_norms, generation_figures, state_figures
from optimum_qvlm.report.precision import (
    bytes_of_modules,
    readable_activation,
    readable_bytes,
    readable_scales,
    scheme_of,
    tensor_bytes,
)

LONG_RECORDS = ("modules", "blocks", "manifest", "model_config")
LABELS = {"tokens": "answer tokens", "mean_kl": "mean KL", "top1_agreement": "same first choice"}


def main(args: Namespace) -> int:
    """Run the command; returns the exit code, see `finish`."""

    def work() -> None:
        found = inspect_checkpoint(args.model, revision=args.revision, variant=args.variant)
        if args.json:
            print_json(as_values(found))
        else:
            say(as_text(found))

    return finish("optimum-cli qvlm info", work, as_json=args.json)


def as_values(found: Inspection) -> dict[str, Any]:
    """Everything, as JSON values."""
    record = found.config.record
    assert record is not None and record.manifest is not None, "inspection refuses others"
    sizes = bytes_of_modules(record.manifest)
    return {
        "name": found.name,
        "commit": found.commit,
        "architecture": found.architecture,
        "format_version": found.values.get("format_version"),
        "settings": {name: value for name, value in found.values.items() if name not in LONG_RECORDS},
        "files": dict(found.files),
        "bytes": {"tensors": sum(map(tensor_bytes, record.manifest.values())), "files": sum(found.files.values())},
        "parts": [row.to_dict() for row in found.rows],
        "blocks": record.blocks,
        "fidelity": fidelity_figures(found.report),
        "states": state_figures(found.report),
        "generation": generation_figures(found.report),
        "modules": {
            name: module.to_dict() | {"scheme": scheme_of(module), "bytes": sizes.get(name, 0)}
            for name, module in record.modules.items()
        },
    }


def as_text(found: Inspection) -> str:
    """For people: the summary, a table of parts, one of modules in which equal layers share a line."""
    record = found.config.record
    assert record is not None and record.manifest is not None, "inspection refuses others"
    sizes = bytes_of_modules(record.manifest)
    parts = [
        ["part", "linears", "precision", "weight scale per", "activation scale per", "weights", "on disk", "error"]
    ]
    for row in found.rows:
        error = "" if row.error is None else f"{row.error:.2e}"
        shown = [
            row.part,
            str(row.linears),
            row.scheme,
            readable_scales(row.weight),
            readable_activation(row.activation),
            f"{row.weights:,}",
        ]
        parts.append([*shown, readable_bytes(row.bytes), error])
    rest = sum(map(tensor_bytes, record.manifest.values())) - sum(sizes.get(name, 0) for name in record.modules)
    parts.append(["everything else", "", "as it was", "", "", "", readable_bytes(rest), ""])
    return "\n".join(
        [*_summary(found), "", *_table(parts), "", _blocks(record.blocks), "", *_table(_modules(record.modules, sizes))]
    )


def _summary(found: Inspection) -> list[str]:
    calibration = found.values.get("calibration", {})
    versions = ", ".join(f"{name} {version}" for name, version in _items(calibration.get("versions")))
    data = "without data"
    if "fingerprint" in calibration:
        data = (
            f"on {calibration.get('samples')} samples ({calibration.get('source')}), seed {calibration.get('seed')}, "
            f"fingerprint {str(calibration['fingerprint'])[:12]}"
        )
    lines = [
        f"{found.name}{'' if found.commit is None else f' at {found.commit[:12]}'}: {found.architecture}",
        f"format      qvlm {found.values.get('format_version')}; configuration, record and tensors fit together",
        f"calibrated  {calibration.get('method')} {data}",
        f"versions    {versions}",
        f"size        {readable_bytes(sum(found.files.values()))} in {len(found.files)} safetensors file(s)",
    ]
    if "base_model" in calibration:
        lines.insert(1, f"base        {calibration['base_model']} at {str(calibration.get('base_revision'))[:12]}")
    if folded := len(folded_norms(found.report)):
        lines.append(f"norms       {folded} differ from the source: they scale what the linears behind them read")
    for name, figures in fidelity_figures(found.report).items():
        shown = ", ".join(f"{LABELS[key]} {value:.4g}" for key, value in figures.items())
        lines.append(f"fidelity    on {name}: {shown}")
    if states := state_figures(found.report):
        lines.append(
            f"fidelity    on hidden states of {states['tokens']} tokens: relative squared error "
            f"{states['relative_error']:.4g}"
        )
    if generated := generation_figures(found.report):
        agreed = "" if generated["exact_match"] == 1 else f"first difference after {generated['agreed_tokens']:.4g} of "
        lines.append(
            f"generation  {100 * generated['exact_match']:.4g} % of {generated['answers']} greedy answers the same, "
            f"{agreed}{generated['tokens']:.4g} tokens on average"
        )
    return lines


def _blocks(blocks: list[dict[str, Any]]) -> str:
    """`blocks  vision 0, 1-2; language 0`."""
    spans: dict[str, list[str]] = {}
    for block in blocks:
        first, last = block.get("first"), block.get("last")
        spans.setdefault(str(block.get("part")), []).append(str(first) if first == last else f"{first}-{last}")
    return "blocks      " + "; ".join(f"{part} {', '.join(numbers)}" for part, numbers in spans.items())


def _modules(modules: Mapping[str, ModuleRecord], sizes: Mapping[str, int]) -> list[list[str]]:
    """Rows of modules; those that differ in layer numbers alone share one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, module in modules.items():
        pattern = ".".join("*" if component.isdigit() else component for component in name.split("."))
        group = "row" if module.weight.group is None else str(module.weight.group)
        key = (pattern, f"{module.out_features}x{module.in_features}", scheme_of(module), group)
        rows.setdefault(key, []).append(name)
    lines = [["module", "", "sizes", "precision", "weight scale per", "on disk"]]
    for (pattern, *shown), names in rows.items():
        total = readable_bytes(sum(sizes.get(name, 0) for name in names))
        lines.append([pattern, f"x{len(names)}" if len(names) > 1 else "", *shown, total])
    return lines


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _items(value: object) -> list[tuple[str, Any]]:
    return [(str(name), entry) for name, entry in value.items()] if isinstance(value, Mapping) else []
