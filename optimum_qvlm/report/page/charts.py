"""Charts as SVG. Every mark says its number where the pointer rests on it; tables beside them have the numbers too.

A chart is at most as wide as a phone is, so that its words stay readable there; wide pages put several side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from optimum_qvlm.report.page.markup import clipped, element, joined
from optimum_qvlm.report.page.numbers import Scale, from_zero, over_decades, readable

WIDTH = 420.0
HEIGHT = 200.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 8.0, 14.0, 34.0
CELL = 14.0
BAR = 22.0
LABEL, LONG_LABEL = 20, 38
"""Characters of a label in front of a bar, and of a row of squares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A bar over a label, or a pair of dots: `value`, and `before` it."""

    label: str
    hint: str
    value: float
    before: float | None = None
    faint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line of points over positions that all series of a chart share; `colour` is the number of its class."""

    name: str
    colour: int
    values: Sequence[float]
    hints: Sequence[str]
    start: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One square of a grid; `colour` None leaves it hollow."""

    row: int
    column: int
    colour: int | None
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What assistive technology reads of a chart, and what its axes say."""

    title: str
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A chart that has its size, but no place yet."""

    title: str
    width: float
    height: float
    content: tuple[Markup, ...]

    def at(self, x: float, y: float) -> Markup:
        """Inside another picture."""
        return element("g", *self.content, transform=f"translate({x:.0f} {y:.0f})")

    def alone(self) -> Markup:
        """As an image of its own."""
        return frame(self.title, self.width, self.height, *self.content, fits=False)


def frame(title: str, width: float, height: float, *content: Markup | None, fits: bool = True) -> Markup:
    """An SVG image with a name. One that `fits` grows with its place; others keep their size."""
    return element(
        "svg",
        element("title", title),
        *content,
        role="img",
        aria_label=title,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        class_="chart fit" if fits else "chart",
    )


def columns(chart: Chart, bars: Sequence[Column], *, line: float | None, borders: Sequence[int]) -> Markup:
    """Bars from zero. `line` is a height drawn across, `borders` the bars before which a block begins."""
    y = from_zero([*(bar.value for bar in bars), *([line] if line is not None else [])], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    marks = [
        mark(
            "rect",
            bar.hint,
            x=LEFT + n * step + step * 0.12,
            y=y(bar.value),
            width=step * 0.76,
            height=max(HEIGHT - BOTTOM - y(bar.value), 0.5),
            class_="s1 faint" if bar.faint else "s1",
        )
        for n, bar in enumerate(bars)
    ]
    rules = [
        element("line", x1=x, x2=x, y1=TOP - 6, y2=HEIGHT - BOTTOM, class_="border")
        for x in (LEFT + n * step for n in borders)
    ]
    across = None
    if line is not None:
        across = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(line), y2=y(line), class_="across")
    labels = _labels([bar.label for bar in bars], step)
    return frame(chart.title, WIDTH, HEIGHT, _axes(chart, y), *rules, *marks, across, labels)


def pairs(chart: Chart, entries: Sequence[Column], *, parts: Sequence[tuple[int, str]] = ()) -> Markup:
    """From `before` to `value`, both as dots over a logarithmic axis. `parts` begin at an entry and have a name."""
    values = [value for entry in entries for value in (entry.value, entry.before) if value is not None]
    y = over_decades(values, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(len(entries), 1)
    radius = min(4.5, max(step * 0.3, 1.5))
    groups = []
    for number, entry in enumerate(entries):
        x = LEFT + (number + 0.5) * step
        dots: list[Markup] = []
        if entry.before is not None:
            dots += [
                element("line", x1=x, x2=x, y1=y(entry.before), y2=y(entry.value), class_="link"),
                element("circle", cx=x, cy=y(entry.before), r=radius, class_="s0"),
            ]
        dots.append(element("circle", cx=x, cy=y(entry.value), r=radius, class_="s1"))
        target = element("rect", x=x - step / 2, y=TOP, width=step, height=HEIGHT - TOP - BOTTOM, class_="target")
        groups.append(mark("g", entry.hint, *dots, target))
    labels = _labels([entry.label for entry in entries], step)
    begun = [
        _begin(LEFT + number * step, name, (end - number) * step)
        for (number, name), (end, _) in pairwise([*parts, (len(entries), "")])
    ]
    return frame(chart.title, WIDTH, HEIGHT, _axes(chart, y), *begun, *groups, labels)


def lines(chart: Chart, series: Sequence[Series], labels: Sequence[str]) -> Markup:
    """Lines with dots over a logarithmic axis."""
    y = over_decades([value for line in series for value in line.values], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(len(labels), 1)
    radius = min(4.0, max(step * 0.25, 1.5))
    drawn = []
    for line in series:
        places = [(LEFT + (line.start + n + 0.5) * step, y(value)) for n, value in enumerate(line.values)]
        path = " ".join(f"{'L' if n else 'M'}{x:.1f} {height:.1f}" for n, (x, height) in enumerate(places))
        drawn.append(element("path", d=path, class_=f"line l{line.colour}"))
        drawn += [
            mark("circle", hint, cx=x, cy=height, r=radius, class_=f"s{line.colour}")
            for (x, height), hint in zip(places, line.hints, strict=True)
        ]
    return frame(chart.title, WIDTH, HEIGHT, _axes(chart, y), *drawn, _labels(labels, step))


def bars(chart: Chart, rows: Sequence[Column], largest: float | None = None) -> Markup:
    """Bars from left to right with their label in front and what they stand for behind."""
    height = len(rows) * (BAR + 8) + 8
    front, behind = 118.0, 84.0
    top = max([*(row.value for row in rows), 1e-12]) if largest is None else largest
    x = Scale(low=0, high=top, start=0, end=WIDTH - front - behind)
    drawn: list[Markup] = []
    for number, row in enumerate(rows):
        y = 6 + number * (BAR + 8)
        drawn += [
            element("text", clipped(row.label, LABEL), x=front - 8, y=y + BAR * 0.68, class_="end"),
            mark(
                "rect",
                row.hint,
                x=front,
                y=y,
                width=max(x(row.value), 1),
                height=BAR,
                rx=3,
                class_="s0" if row.faint else "s1",
            ),
            element("text", row.hint.rpartition(": ")[2], x=front + max(x(row.value), 1) + 6, y=y + BAR * 0.68),
        ]
    return frame(chart.title, WIDTH, height, *drawn)


def grid(title: str, rows: Sequence[str], numbers: Sequence[str], cells: Sequence[Cell]) -> Drawing:
    """Squares in named rows; `numbers` stand over the columns as far as there is room."""
    front = 16 + 6.4 * max((min(len(row), LONG_LABEL) for row in rows), default=0)
    top = 20.0 if len(numbers) > 1 else 4.0
    width, height = front + len(numbers) * CELL + 10, top + len(rows) * CELL + 4
    every = next((n for n in (1, 2, 5, 10, 20, 50) if len(numbers) / n <= max(len(numbers) * CELL / 24, 1)), 100)
    names = [
        element("text", clipped(row, LONG_LABEL), x=front - 6, y=top + (n + 0.76) * CELL, class_="end")
        for n, row in enumerate(rows)
    ]
    over = [
        element("text", number, x=front + (n + 0.5) * CELL, y=top - 5, class_="middle")
        for n, number in enumerate(numbers)
        if n % every == 0 and len(numbers) > 1
    ]
    squares = [
        mark(
            "rect",
            cell.hint,
            x=front + cell.column * CELL + 1,
            y=top + cell.row * CELL + 1,
            width=CELL - 2,
            height=CELL - 2,
            rx=2,
            class_="hollow" if cell.colour is None else f"s{cell.colour}",
        )
        for cell in cells
    ]
    return Drawing(title=title, width=width, height=height, content=(*names, *over, *squares))


def mark(name: str, hint: str, *content: Markup, **attributes: str | float | None) -> Markup:
    """What a reader can point at to see its number."""
    classes = f"mark {attributes.pop('class_', None) or ''}".strip()
    return element(name, element("title", hint), *content, **attributes, class_=classes)


def legend(entries: Sequence[tuple[int | None, str]]) -> Markup:
    """Names of colours, above a chart."""
    return element(
        "p",
        *(
            element("span", element("i", class_="hollow" if colour is None else f"b{colour}"), name)
            for colour, name in entries
        ),
        class_="legend",
    )


def _axes(chart: Chart, y: Scale) -> Markup:
    rules = [
        joined(
            [
                element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="rule"),
                element("text", _tick(tick, y), x=LEFT - 6, y=y(tick) + 4, class_="end"),
            ]
        )
        for tick in y.ticks()
    ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    names = [
        element("text", chart.x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 3, class_="middle name"),
        element("text", chart.y_label, transform=f"translate(11 {middle:.0f}) rotate(-90)", class_="middle name"),
    ]
    return joined([*rules, *names])


def _begin(x: float, name: str, room: float) -> Markup:
    """Where a part begins; its name only where that has room."""
    line = element("line", x1=x, x2=x, y1=TOP - 8, y2=HEIGHT - BOTTOM, class_="rule")
    return joined([line, element("text", name, x=x + 4, y=TOP - 4) if len(name) * 6 < room else None])


def _tick(value: float, scale: Scale) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if scale.logarithmic else readable(value)


def _labels(labels: Sequence[str], step: float) -> Markup:
    """As many of the labels as have room."""
    room = 6.2 * max(map(len, labels), default=1) + 6
    every = max(1, -(-int(room) // max(int(step), 1))) if step < room else 1
    return joined(
        element("text", label, x=LEFT + (n + 0.5) * step, y=HEIGHT - BOTTOM + 14, class_="middle")
        for n, label in enumerate(labels)
        if n % every == 0
    )
