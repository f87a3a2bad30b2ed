"""Tables, and figures that fold one out below them."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from optimum_qvlm.report.page.markup import Content, element

MOST_ROWS = 600
"""Rows of one table: `qvlm_report.json` has the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page; `short` names it in the list of links, `lead` explains it, whatever model it is of."""

    anchor: str
    title: str
    short: str
    lead: str
    body: Markup


def table(head: Sequence[str], rows: Sequence[Sequence[Content]], *, numbers: Sequence[int] = ()) -> Markup:
    """`numbers` are the columns that are set to the right."""
    shown = list(rows[:MOST_ROWS])
    body = [
        element("tr", *(element("td", cell, class_="n" if n in numbers else None) for n, cell in enumerate(row)))
        for row in shown
    ]
    if len(rows) > len(shown):
        more = f"… and {len(rows) - len(shown):,} more, see qvlm_report.json"
        body.append(element("tr", element("td", more, colspan=str(len(head)))))
    header = element(
        "tr", *(element("th", name, scope="col", class_="n" if n in numbers else None) for n, name in enumerate(head))
    )
    return element("div", element("table", element("thead", header), element("tbody", *body)), class_="scroll")


def figure(caption: str, *charts: Markup, numbers: Markup | None = None) -> Markup:
    """Charts with a caption above and their table to unfold below."""
    folded = None
    if numbers is not None:
        folded = element("details", element("summary", "Numbers"), numbers)
    return element(
        "figure",
        element("figcaption", caption),
        element("div", *charts, class_="charts"),
        folded,
    )


def panel(name: str, chart: Markup, *, wide: bool = False) -> Markup:
    """One of several charts of a figure, with its name; a `wide` one takes a row of its own."""
    shown = element("div", chart, class_="scroll")
    return element("div", element("h4", name) if name else None, shown, class_="panel wide" if wide else "panel")
