"""Dependency of layers, and errors of blocks, layers and sites."""

from collections.abc import Sequence

from markupsafe import Markup

from optimum_qvlm.report.page.charts import Chart, Column, Series, columns, legend, lines, pairs
from optimum_qvlm.report.page.markup import element, joined
from optimum_qvlm.report.page.numbers import duration, readable
from optimum_qvlm.report.page.reading import BlockRow, LayerRow, Reading
from optimum_qvlm.report.page.tables import Section, figure, panel, table

MOST_MARKS = 400
"""Dots in one chart."""


def dependency(reading: Reading) -> Section | None:
    """How much each layer leaves open about the next, and which layers were searched together for it."""
    rows = reading.dependencies
    if not rows:
        return None
    threshold = reading.figure("threshold")
    line = None if threshold is None else float(max(threshold, 0))
    panels = [panel(part, _dependency_chart(reading, part, line)) for part in dict.fromkeys(row.part for row in rows)]
    shown = [
        [row.part, f"{row.layer} → {row.layer + 1}", readable(row.entropy), "upper bound" if row.marginal else ""]
        for row in rows
    ]
    entries: list[tuple[int | None, str]] = [(1, "dependency, in nats")]
    if line is not None:
        entries.append((4, f"threshold: {readable(line)} nats"))
    return Section(
        anchor="dependency",
        title="Dependency of layers and the blocks",
        short="Dependency",
        lead=(
            "How much the quantized output of a layer leaves open about that of the next. Layers whose dependency adds "
            "up to more than the threshold are searched together; dashed lines are the borders of blocks."
        ),
        body=joined(
            [
                legend(entries),
                figure(
                    "Pairs of consecutive layers",
                    *panels,
                    numbers=joined(
                        [table(["part", "layers", "dependency", ""], shown, numbers=(2,)), _block_table(reading.blocks)]
                    ),
                ),
            ]
        ),
    )


def _dependency_chart(reading: Reading, part: str, line: float | None) -> Markup:
    rows = [row for row in reading.dependencies if row.part == part][:MOST_MARKS]
    starts = {block.first for block in reading.blocks if block.part == part}
    bars = [
        Column(
            label=f"{row.layer}",
            hint=f"{part} layers {row.layer} and {row.layer + 1}: {readable(row.entropy)} nats"
            + (" (upper bound)" if row.marginal else ""),
            value=float(max(row.entropy, 0)),
            faint=row.marginal,
        )
        for row in rows
    ]
    # The bar of layers k and k + 1 stands at k: a block that begins with k + 1 cuts this pair.
    borders = [number for number, row in enumerate(rows) if row.layer + 1 in starts]
    chart = Chart(title=f"dependency of the {part} layers", x_label="first layer of the pair", y_label="nats")
    return columns(chart, bars, line=line, borders=borders)


def blocks(reading: Reading) -> Section | None:
    """The joint search of each block."""
    rows = [block for block in reading.blocks if block.before is not None and block.after is not None]
    if not rows:
        return None
    drawn = rows[:MOST_MARKS]
    begins = [(n, block.part) for n, block in enumerate(drawn) if n == 0 or drawn[n - 1].part != block.part]
    chart = Chart(title="error of each block", x_label="layers of the block, by part", y_label="relative error")
    picture = panel("", pairs(chart, [_block_column(block) for block in drawn], parts=begins))
    moved = sum(block.after < block.before for block in rows)  # type: ignore[operator]
    return Section(
        anchor="blocks",
        title="Error of each block, before and after the joint search",
        short="Blocks",
        lead=(
            "Squared difference of the block's output from full precision over its squared norm. The joint search "
            "never takes anything worse."
        ),
        body=joined(
            [
                element("p", f"It found something better in {moved} of {len(rows)} blocks."),
                legend([(0, "every site at its own optimum"), (1, "after the joint search")]),
                figure("Blocks in order", picture, numbers=_block_table(reading.blocks)),
            ]
        ),
    )


def _block_column(block: BlockRow) -> Column:
    assert block.before is not None and block.after is not None
    change = f", {1 - block.after / block.before:.1%} less" if block.before > block.after > 0 else ""
    hint = f"{block.part} layers {block.span}: {readable(block.before)} before, {readable(block.after)} after{change}"
    return Column(label=block.span, hint=hint, value=float(block.after), before=float(block.before))


def _block_table(rows: Sequence[BlockRow]) -> Markup:
    cells = [
        [
            row.part,
            row.span,
            *("" if error is None else readable(error) for error in (row.before, row.after)),
            "" if row.seconds is None else duration(row.seconds),
        ]
        for row in rows
    ]
    return table(["part", "layers of the block", "before", "after", "search"], cells, numbers=(2, 3, 4))


def layers(reading: Reading) -> Section | None:
    """Vision against text: the error through the parts, and of image and text tokens in the decoder."""
    rows = reading.layers[:MOST_MARKS]
    if not rows:
        return None
    names = list(dict.fromkeys(row.part for row in rows))
    whole = Chart(title="error of each layer's output, part by part", x_label="layer of the model, in order",
                  y_label="relative error")  # fmt: skip
    series = [_part_series(part, number + 1, rows) for number, part in enumerate(names)]
    panels = [panel("by part", lines(whole, series, [str(number) for number in range(len(rows))]))]
    told = [row for row in rows if row.image_error is not None and row.text_error is not None]
    entries: list[tuple[int | None, str]] = [(line.colour, line.name) for line in series]
    below = None
    if told:
        chart = Chart(title="error of image tokens and of text tokens", x_label="layer", y_label="relative error")
        both = [_token_series(told, image=True), _token_series(told, image=False)]
        below = joined(
            [
                legend([(line.colour, line.name) for line in both]),
                figure(
                    "Image tokens against text tokens",
                    panel(told[0].part, lines(chart, both, [str(row.number) for row in told])),
                    numbers=_token_table(told),
                ),
            ]
        )
    shown = [[row.part, row.name, readable(row.error)] for row in rows]
    return Section(
        anchor="layers",
        title="Vision against text",
        short="Layers",
        lead="Error of each layer's output against full precision, with what all layers before it did.",
        body=joined(
            [
                legend(entries),
                figure("Through the model", *panels, numbers=table(["part", "layer", "error"], shown, numbers=(2,))),
                below,
            ]
        ),
    )


def _part_series(part: str, colour: int, rows: Sequence[LayerRow]) -> Series:
    places = [number for number, row in enumerate(rows) if row.part == part]
    members = [rows[number] for number in places]
    return Series(
        name=part,
        colour=min(colour, 7),
        values=[float(row.error) for row in members],
        hints=[f"{row.name}: {readable(row.error)}" for row in members],
        start=places[0],
    )


def _token_series(rows: Sequence[LayerRow], *, image: bool) -> Series:
    errors = [float((row.image_error if image else row.text_error) or 0) for row in rows]
    name = "image tokens" if image else "text tokens"
    return Series(
        name=name,
        colour=1 if image else 3,
        values=errors,
        hints=[f"{row.name}, {name}: {readable(error)}" for row, error in zip(rows, errors, strict=True)],
    )


def _token_table(rows: Sequence[LayerRow]) -> Markup:
    cells = [[row.name, readable(row.image_error or 0), readable(row.text_error or 0)] for row in rows]
    return table(["layer", "image tokens", "text tokens"], cells, numbers=(1, 2))


def sites(reading: Reading) -> Section | None:
    """Each site alone: rounding to nearest against what it got."""
    rows = reading.sites
    if not rows:
        return None
    drawn = rows[:MOST_MARKS]
    entries = [
        Column(
            label=str(number),
            hint=f"{row.name}: {readable(row.nearest)} rounded to nearest, {readable(row.found)} at its own optimum, "
            f"{readable(row.chosen)} as chosen",
            value=float(row.chosen),
            before=float(row.nearest),
        )
        for number, row in enumerate(drawn)
    ]
    shown = [[row.name, readable(row.nearest), readable(row.found), readable(row.chosen)] for row in rows]
    chart = Chart(title="error of every site", x_label="site, in order of execution", y_label="relative error")
    return Section(
        anchor="sites",
        title="Error of each site",
        short="Sites",
        lead="A site is what one tensor is read by: query, key and value share one. Error of its outputs alone.",
        body=joined(
            [
                legend([(0, "rounded to nearest"), (1, "as chosen")]),
                figure(
                    "Sites in order",
                    panel("", pairs(chart, entries)),
                    numbers=table(["site", "rounded to nearest", "own optimum", "as chosen"], shown, numbers=(1, 2, 3)),
                ),
            ]
        ),
    )
