"""The whole page, of one model or of two side by side."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from optimum_qvlm.report.page import calibration, errors, fidelity, model_map, overview
from optimum_qvlm.report.page.markup import clipped, element, joined, void
from optimum_qvlm.report.page.reading import Reading
from optimum_qvlm.report.page.tables import Section, table
from optimum_qvlm.version import __version__

PAGE_FILE = "qvlm_report.html"
LARGEST = 2_000_000
"""Bytes of a page at most."""

LEFT_OUT = "Too large for this page; qvlm_report.json has it."

LONGEST_NAME = 120

SECTIONS: tuple[Callable[[Reading], Section | None], ...] = (
    overview.warnings,
    overview.sizes,
    model_map.precision,
    errors.dependency,
    errors.blocks,
    errors.layers,
    errors.sites,
    model_map.transforms,
    fidelity.fidelity,
    fidelity.answers,
    calibration.encoder,
    calibration.kept,
    calibration.calibration,
)


def render_page(reading: Reading) -> str:
    """The page of one model: it fetches nothing, runs no script but its own, and has at most `LARGEST` bytes."""
    sections = [section for make in SECTIONS if (section := make(reading)) is not None]
    name = clipped(reading.name, LONGEST_NAME)
    head = element(
        "header",
        element("h1", name),
        element("p", _subtitle(reading), class_="lead"),
        overview.headline(reading),
    )
    shown = [(section, section.body) for section in sections]
    return _document(f"{name}: quantization report", head, shown)


def render_comparison(first: Reading, second: Reading) -> str:
    """Two models side by side: their figures in one table, then section by section."""
    names = [clipped(reading.name, LONGEST_NAME) for reading in (first, second)]
    head = element(
        "header",
        element("h1", f"{names[0]} and {names[1]}"),
        element("p", "Two quantized models side by side.", class_="lead"),
        _compared(first, second),
    )
    shown = []
    for make in SECTIONS:
        found = [make(reading) for reading in (first, second)]
        section = next((one for one in found if one is not None), None)
        if section is None:
            continue
        halves = [element("div", element("h3", name), _half(one)) for name, one in zip(names, found, strict=True)]
        shown.append((section, element("div", *halves, class_="two")))
    return _document(f"{names[0]} and {names[1]}: quantization reports", head, shown)


def _half(section: Section | None) -> Markup:
    return element("p", "Not in this report.", class_="soft") if section is None else section.body


def _subtitle(reading: Reading) -> str:
    settings, base = reading.mapping("settings"), reading.mapping("calibration").get("base_model")
    source = f"{base} quantized" if isinstance(base, str) else "Quantized"
    scheme, vision = settings.get("scheme"), settings.get("vision_scheme")
    at = f" at {scheme}" if isinstance(scheme, str) else ""
    tower = f", vision tower and projector at {vision}" if isinstance(vision, str) and len(reading.parts) > 1 else ""
    return f"{source} with optimum-qvlm{at}{tower}."


def _compared(first: Reading, second: Reading) -> Markup:
    """The figures that stand first, of both."""
    found = [{name: value for value, name, _ in overview.headline_figures(reading)} for reading in (first, second)]
    rows = [[name, *(side.get(name, "") for side in found)] for name in dict.fromkeys([*found[0], *found[1]])]
    names = [clipped(reading.name, 60) for reading in (first, second)]
    return table(["figure", *names], rows, numbers=(1, 2))


def _document(title: str, head: Markup, sections: Sequence[tuple[Section, Markup]]) -> str:
    """The page; where it would be too large, the largest sections say so in place of their content."""
    shown = dict(sections)
    while len(page := _assembled(title, head, shown).encode()) > LARGEST:
        largest = max(shown, key=lambda section: len(shown[section]))
        shown[largest] = element("p", LEFT_OUT, class_="note")
    return page.decode()


def _assembled(title: str, head: Markup, sections: Mapping[Section, Markup]) -> str:
    links = [element("a", section.short, href=f"#{section.anchor}") for section in sections]
    button = element("button", "Light or dark", id="theme", type="button", hidden="")
    body = [
        element(
            "section",
            element("h2", section.title),
            element("p", section.lead, class_="lead") if section.lead else None,
            content,
            id=section.anchor,
        )
        for section, content in sections.items()
    ]
    foot = element("footer", f"Written by optimum-qvlm {__version__}. Every number here is in qvlm_report.json.")
    shown = element(
        "body",
        head,
        element("nav", *links, button, aria_label="sections"),
        element("main", *body),
        foot,
        element("script", Markup(resource("page.js"))),
    )
    return str(joined([Markup("<!doctype html>\n"), element("html", _head(title), shown, lang="en"), Markup("\n")]))


def _head(title: str) -> Markup:
    """With the rules that keep the browser from running or fetching anything else."""
    style = resource("page.css")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(resource('page.js'))}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=policy),
        void("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name_="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(style)),
    )


@cache
def resource(name: str) -> str:
    """A file beside this one."""
    return files("optimum_qvlm.report.page").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
