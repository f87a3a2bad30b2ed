"""The first sections: what to know before anything else, and how large the model is."""

from collections.abc import Sequence

from markupsafe import Markup

from optimum_qvlm.report.figures import fidelity_figures, generation_figures, memory_bytes, state_figures
from optimum_qvlm.report.page.charts import Chart, Column, bars
from optimum_qvlm.report.page.markup import element
from optimum_qvlm.report.page.numbers import duration, percent, readable
from optimum_qvlm.report.page.reading import Reading
from optimum_qvlm.report.page.tables import Section, figure, panel, table
from optimum_qvlm.report.precision import readable_bytes

FEW_SAMPLES = 16
"""Below this many, the search may follow single samples."""

FEW_TOKENS = 100
"""With fewer answer tokens, a share of equal first choices is known to no better than about 5 percentage points."""

FAR_KL, FAR_AGREEMENT = 0.1, 0.95
"""Beyond these, answers differ often enough that people notice."""

LARGE_ERROR = 0.1
"""Relative squared error of a layer that deserves a look."""

MOST_WARNINGS = 30


def headline_figures(reading: Reading) -> list[tuple[str, str, str]]:
    """Value, name and explanation of the few figures that stand first."""
    tiles = []
    memory = memory_bytes(reading.report)
    if memory is not None:
        before, after = memory
        shown = f"{readable_bytes(before)} → {readable_bytes(after)}"
        tiles.append((f"{before / after:.2f}x", "less memory", shown))
    fidelity = fidelity_figures(reading.report)
    entry = fidelity.get("decode") or next(iter(fidelity.values()), None)
    if entry is not None:
        agreement = entry.get("top1_agreement")
        if agreement is not None:
            tiles.append((percent(agreement), "same first choice", "of answer tokens"))
        tiles.append((readable(entry["mean_kl"]), "mean KL", "nats, from full precision"))
    generated = generation_figures(reading.report)
    if generated:
        tiles.append((percent(generated["exact_match"]), "same answers", f"of {generated['answers']} greedy answers"))
    states = state_figures(reading.report)
    if states:
        tiles.append((readable(states["relative_error"]), "error of states", "squared, relative"))
    seconds = reading.figure("seconds")
    if seconds is not None and seconds >= 0:
        tiles.append((duration(seconds), "search", "wall-clock time"))
    return tiles


def headline(reading: Reading) -> Markup:
    """The figures as tiles."""
    tiles = [
        element("div", element("b", value), element("span", name), element("small", more), class_="tile")
        for value, name, more in headline_figures(reading)
    ]
    return element("div", *tiles, class_="tiles")


def warnings_of(reading: Reading) -> list[str]:
    """What the calibration said, and what its figures say."""
    said = reading.report.get("warnings")
    found = [line for line in (said if isinstance(said, list) else ()) if isinstance(line, str)]
    return [*found, *_of_data(reading), *_of_fidelity(reading), *_of_errors(reading)][:MOST_WARNINGS]


def warnings(reading: Reading) -> Section:
    """First of all."""
    lines = warnings_of(reading)
    body = element("p", "Nothing to warn of.", class_="fine")
    if lines:
        body = element("ul", *(element("li", line) for line in lines), class_="warnings")
    return Section(anchor="warnings", title="Warnings", short="Warnings", lead="", body=body)


def sizes(reading: Reading) -> Section | None:
    """Memory, and files, before and after."""
    memory, held = memory_bytes(reading.report), reading.mapping("bytes")
    source, saved = reading.figure("source_files", held), sum(reading.files.values())
    groups: list[tuple[str, float | None, float]] = []
    if memory is not None:
        groups.append(("Parameters and buffers in memory", *memory))
    if source is not None and source > 0 and saved > 0:
        groups.append(("Weight files", source, saved))
    elif saved > 0:
        groups.append(("Weight files", None, saved))
    if not groups:
        return None
    panels, rows = [], []
    for name, before, after in groups:
        panels.append(panel(name, _size_chart(name, before, after)))
        ratio = "" if before is None else f"{before / after:.2f}x"
        rows.append([name, "" if before is None else readable_bytes(before), readable_bytes(after), ratio])
    numbers = table(["", "full precision", "quantized", "smaller by"], rows, numbers=(1, 2, 3))
    return Section(
        anchor="size",
        title="Size",
        short="Size",
        lead="The whole model: quantized linears with their scales, and everything that stayed as it was.",
        body=figure("Before and after", *panels, numbers=numbers),
    )


def _size_chart(name: str, before: float | None, after: float) -> Markup:
    rows = [] if before is None else [_size_row("full precision", before, faint=True)]
    return bars(Chart(title=f"{name}, before and after"), [*rows, _size_row("quantized", after, faint=False)])


def _size_row(label: str, size: float, *, faint: bool) -> Column:
    return Column(label=label, hint=f"{label}: {readable_bytes(size)}", value=float(size), faint=faint)


def _of_data(reading: Reading) -> Sequence[str]:
    calibration = reading.mapping("calibration")
    samples = reading.figure("samples", calibration)
    if calibration.get("method") == "rtn":
        return ['Rounded to nearest without data (method="rtn"): no error was measured.']
    if samples is not None and samples < FEW_SAMPLES:
        return [f"Calibrated on {samples:.0f} samples: fewer than {FEW_SAMPLES} may not stand for what the model sees."]
    return []


def _of_fidelity(reading: Reading) -> Sequence[str]:
    figures = fidelity_figures(reading.report)
    if not figures and not state_figures(reading.report):
        return [
            "Closeness to full precision was not measured: the dataset had no samples beyond those of the calibration. "
            "Pass more samples than num_samples."
        ]
    lines = []
    for name, entry in figures.items():
        agreement, tokens = entry.get("top1_agreement"), entry.get("tokens")
        if entry["mean_kl"] > FAR_KL or (agreement is not None and agreement < FAR_AGREEMENT):
            same = "" if agreement is None else f", same first choice on {percent(agreement)} of tokens"
            lines.append(f"Far from full precision on {name}: mean KL {readable(entry['mean_kl'])}{same}.")
        if tokens is not None and tokens < FEW_TOKENS and name != "decode":
            lines.append(f"Closeness on {name} rests on {tokens:.0f} answer tokens only; read it as a rough figure.")
    return lines


def _of_errors(reading: Reading) -> Sequence[str]:
    lines = []
    worst = max(reading.layers, key=lambda row: row.error, default=None)
    if worst is not None and worst.error > LARGE_ERROR:
        lines.append(
            f"The output of {worst.name} differs from full precision by {percent(worst.error)} of its square, "
            "the errors of all layers before it included."
        )
    unused = reading.report.get("unused")
    names = [name for name in (unused if isinstance(unused, list) else ()) if isinstance(name, str)]
    if names:
        lines.append(
            f"Nothing reads the output of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}: rounded to "
            "nearest, without data."
        )
    return lines
