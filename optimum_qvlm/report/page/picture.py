"""The picture of a model card: sizes, closeness and precision at a glance, as one SVG file."""

from markupsafe import Markup

from optimum_qvlm.report.page.document import resource
from optimum_qvlm.report.page.markup import clipped, element, joined
from optimum_qvlm.report.page.model_map import precision_maps, schemes
from optimum_qvlm.report.page.overview import headline_figures
from optimum_qvlm.report.page.reading import Reading

PICTURE_FILE = "qvlm_report.svg"

WIDTH = 840.0
MARGIN = 28.0
TILES = 4
LARGEST = 400_000
"""Bytes of a picture at most: maps of larger models are left out."""


def render_picture(reading: Reading) -> str:
    """An SVG file that needs no other, in the colours of the page around it, light or dark."""
    picture = _drawn(reading, maps=True)
    if len(picture.encode()) > LARGEST:
        picture = _drawn(reading, maps=False)
    return picture


def _drawn(reading: Reading, *, maps: bool) -> str:
    content: list[Markup] = [element("text", clipped(reading.name, 60), x=MARGIN, y=44, class_="title")]
    figures = headline_figures(reading)[:TILES]
    step = (WIDTH - 2 * MARGIN) / TILES
    for number, (value, name, more) in enumerate(figures):
        x = MARGIN + number * step
        content += [
            element("text", value, x=x, y=92, class_="value"),
            element("text", name, x=x, y=113, class_="name"),
            element("text", clipped(more, 28), x=x, y=130),
        ]
    y = 156.0 if figures else 70.0
    if maps and reading.modules:
        content.append(_legend(reading, y))
        drawn, y = _maps(reading, y + 18)
        content.append(drawn)
    title = f"{clipped(reading.name, 60)}: sizes, closeness to full precision, and precision of every linear"
    ground = element("rect", x=0.5, y=0.5, width=WIDTH - 1, height=y + 11, rx=12, class_="ground")
    picture = element(
        "svg",
        element("title", title),
        element("style", Markup(resource("picture.css"))),
        ground,
        *content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:.0f} {y + 12:.0f}",
        width=WIDTH,
        height=y + 12,
        role="img",
        aria_label=title,
    )
    return f"{picture}\n"


def _legend(reading: Reading, y: float) -> Markup:
    entries: list[tuple[int | None, str]] = [(colour, scheme) for scheme, colour in schemes(reading).items()]
    if any(row.record is None for row in reading.modules):
        entries.append((None, "full precision"))
    parts, x = [], MARGIN
    for colour, name in entries[:8]:
        shade = "hollow" if colour is None else f"s{colour}"
        parts += [
            element("rect", x=x, y=y - 10, width=11, height=11, rx=2, class_=shade),
            element("text", name, x=x + 17, y=y),
        ]
        x += 40 + 6.5 * len(name)
    return joined(parts)


def _maps(reading: Reading, y: float) -> tuple[Markup, float]:
    """From left to right, in as many rows as they need; returns them and where they end."""
    parts: list[Markup] = []
    x, deepest = MARGIN, y
    for name, drawing in precision_maps(reading):
        if x > MARGIN and x + max(drawing.width, 7.6 * min(len(name), 50)) > WIDTH - MARGIN:
            x, y = MARGIN, deepest
        shrink = min(1.0, (WIDTH - 2 * MARGIN) / drawing.width)
        inside = element("g", drawing.at(0, 0), transform=f"translate({x:.0f} {y + 18:.0f}) scale({shrink:.3f})")
        parts += [element("text", clipped(name, 50), x=x, y=y + 12, class_="name"), inside]
        x += max(drawing.width * shrink, 7.6 * min(len(name), 50)) + 30
        deepest = max(deepest, y + 18 + drawing.height * shrink + 14)
    return joined(parts), deepest
