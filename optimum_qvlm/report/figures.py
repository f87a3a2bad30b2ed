"""Figures of a report that came with a checkpoint: anybody may have written it, so what is odd counts as absent."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from optimum_qvlm.files import strict_json

HELD_OUT = "held-out samples"
"""What figures of fidelity without a name are measured on."""

GENERATION = ("answers", "tokens", "agreed_tokens", "exact_match")
"""What is said of greedy answers."""

STATES = ("tokens", "relative_error")
"""What is said of the hidden states of models that predict no tokens."""

LARGEST = 1e18


def read_report(data: bytes) -> dict[str, Any]:
    """The content of a report; empty where it is no JSON object."""
    try:
        found = strict_json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def is_figure(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def measured_layers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers of which it says where they are and how large their error is."""
    layers = report.get("layers")
    return [
        layer
        for layer in (layers if isinstance(layers, list) else ())
        if isinstance(layer, dict) and isinstance(layer.get("layer"), str) and is_figure(layer.get("error"))
    ]


def kept_names(report: Mapping[str, Any]) -> list[str]:
    """Linears that were kept in full precision."""
    names = report.get("kept_in_full_precision")
    return [name for name in (names if isinstance(names, list) else ()) if isinstance(name, str)]


def folded_norms(report: Mapping[str, Any]) -> list[str]:
    """Norms that have taken up an equalizer."""
    found = report.get("folded_into_norms")
    return [norm for norm in (found.values() if isinstance(found, Mapping) else ()) if isinstance(norm, str)]


def memory_bytes(report: Mapping[str, Any]) -> tuple[int | float, int | float] | None:
    """Bytes in memory before and after; None where they are not known."""
    found = report.get("bytes")
    before, after = (found.get("before"), found.get("after")) if isinstance(found, Mapping) else (None, None)
    return (before, after) if is_figure(before) and is_figure(after) and min(before, after) > 0 else None


def fidelity_figures(report: Mapping[str, Any]) -> dict[str, dict[str, int | float]]:
    """Fidelity to full precision by what it was measured on, where the report has any: one set of figures, or several
    by name, each with `mean_kl` and perhaps `tokens` and `top1_agreement`."""
    found = report.get("fidelity")
    if not isinstance(found, Mapping):
        return {}
    named = {HELD_OUT: found} if "mean_kl" in found else found
    sets = {str(name): entry for name, entry in named.items() if isinstance(entry, Mapping)}
    shown = {name: _figures(entry, ("tokens", "mean_kl", "top1_agreement")) for name, entry in sets.items()}
    return {name: figures for name, figures in shown.items() if "mean_kl" in figures}


def generation_figures(report: Mapping[str, Any]) -> dict[str, int | float]:
    """Agreement of greedy answers with those of full precision; empty where the report does not have all of it."""
    fidelity = report.get("fidelity")
    found = fidelity.get("generate") if isinstance(fidelity, Mapping) else None
    figures = _figures(found, GENERATION) if isinstance(found, Mapping) else {}
    return figures if len(figures) == len(GENERATION) else {}


def state_figures(report: Mapping[str, Any]) -> dict[str, int | float]:
    """How close hidden states are to those of full precision; empty where the report does not have all of it."""
    fidelity = report.get("fidelity")
    found = fidelity.get("states") if isinstance(fidelity, Mapping) else None
    figures = _figures(found, STATES) if isinstance(found, Mapping) else {}
    return figures if len(figures) == len(STATES) else {}


def _figures(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, int | float]:
    return {name: entry[name] for name in names if is_figure(entry.get(name))}
