"""What was kept in full precision, how the encoder learned, and how the calibration was done."""

from collections.abc import Mapping

from optimum_qvlm.report.page.charts import Chart, Series, legend, lines
from optimum_qvlm.report.page.markup import Content, element, joined
from optimum_qvlm.report.page.numbers import duration, readable
from optimum_qvlm.report.page.reading import Reading
from optimum_qvlm.report.page.tables import Section, figure, panel, table

TERMS = ("answer", "entropy", "vision", "final", "total")


def kept(reading: Reading) -> Section | None:
    """Linears in full precision, with reasons where the report has them."""
    if not reading.kept:
        return None
    rows = [[element("code", name), reason or "not recorded"] for name, reason in reading.kept.items()]
    return Section(
        anchor="kept",
        title="Kept in full precision",
        short="Kept",
        lead="Embeddings, norms and convolutions are never quantized and are not listed.",
        body=table(["linear", "why"], rows),
    )


def encoder(reading: Reading) -> Section | None:
    """Losses of the encoder's optimisation, epoch by epoch."""
    entry = reading.mapping("encoder")
    losses = entry.get("losses")
    epochs = [loss for loss in (losses if isinstance(losses, list) else ())[:400] if isinstance(loss, Mapping)]
    values = {term: [reading.figure(term, loss) for loss in epochs] for term in TERMS}
    whole = {
        term: [float(value) for value in found if value is not None and value >= 0] for term, found in values.items()
    }
    drawn = {term: found for term, found in whole.items() if found and len(found) == len(epochs)}
    if not drawn:
        return None
    series = [
        Series(
            name=term,
            colour=number + 1,
            values=found,
            hints=[f"{term}, epoch {epoch}: {readable(value)}" for epoch, value in enumerate(found)],
        )
        for number, (term, found) in enumerate(drawn.items())
    ]
    labels = [str(epoch) for epoch in range(len(epochs))]
    chart = Chart(title="losses of the encoder's optimisation", x_label="epoch", y_label="loss")
    shown = [[label, *(readable(found[int(label)]) for found in drawn.values())] for label in labels]
    chosen, seconds = reading.figure("chosen_epoch", entry), reading.figure("seconds", entry)
    said = [] if chosen is None else [f"The encoder got what epoch {chosen:.0f} left; 0 is before the first."]
    said += [] if seconds is None else [f"It took {duration(max(seconds, 0))}."]
    return Section(
        anchor="encoder",
        title="Optimising the visual encoder",
        short="Encoder",
        lead="Tower and projector learn by gradients through the language model.",
        body=joined(
            [
                element("p", " ".join(said)) if said else None,
                legend([(line.colour, line.name) for line in series]),
                figure(
                    "Loss by epoch",
                    panel("", lines(chart, series, labels)),
                    numbers=table(["epoch", *drawn], shown, numbers=tuple(range(1, len(drawn) + 1))),
                ),
            ]
        ),
    )


def calibration(reading: Reading) -> Section | None:
    """Data, time, versions and settings."""
    found = reading.mapping("calibration")
    rows: list[list[Content]] = []
    for name, label in (
        ("method", "method"),
        ("base_model", "source"),
        ("base_revision", "commit of the source"),
        ("source", "data"),
        ("samples", "samples"),
        ("seed", "seed"),
        ("fingerprint", "fingerprint of the data (SHA-256)"),
    ):
        if isinstance(found.get(name), str | int) and not isinstance(found.get(name), bool):
            rows.append([label, _plain(found[name])])
    seconds = reading.figure("seconds")
    if seconds is not None and seconds >= 0:
        rows.append(["time of the search", duration(seconds)])
    searches = [block.seconds for block in reading.blocks if block.seconds is not None]
    if searches:
        rows.append(["of which joint searches", duration(sum(searches))])
    versions = found.get("versions")
    listed: list[list[Content]] = [
        [name, version]
        for name, version in (versions.items() if isinstance(versions, Mapping) else ())
        if isinstance(name, str) and isinstance(version, str)
    ]
    rows += listed[:20]
    settings: list[list[Content]] = [
        [name, _plain(value)] for name, value in list(reading.mapping("settings").items())[:100]
    ]
    if not rows and not settings:
        return None
    folded = element("details", element("summary", "Settings"), table(["setting", "value"], settings))
    return Section(
        anchor="calibration",
        title="Calibration",
        short="Calibration",
        lead="What it was done with, and how long it took.",
        body=joined([table(["", ""], rows), folded if settings else None]),
    )


def _plain(value: object) -> str:
    """As Python writes it, never longer than can be read; integers of any length among them."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    shown = value if isinstance(value, str) else repr(value)
    return shown[:400]
