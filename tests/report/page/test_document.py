"""The page: what it shows, that it needs nothing else, and that no report can make it do anything."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_qvlm.report.page.document import LARGEST, render_comparison, render_page
from optimum_qvlm.report.page.reading import Reading
from tests.report.page.reports import HOSTILE, early_report, full_report, hostile_report

SECTIONS = [
    "warnings",
    "size",
    "precision",
    "dependency",
    "blocks",
    "layers",
    "sites",
    "transforms",
    "fidelity",
    "answers",
    "encoder",
    "kept",
    "calibration",
]
EARLY = [name for name in SECTIONS if name not in ("encoder", "answers")]
VOID = {"meta", "img"}
TAGS = set(
    "html head meta title style body header h1 h2 h3 h4 p div b span small nav a button main section ul li figure "
    "figcaption details summary table thead tbody tr th td code svg g rect circle line path text article img dl dt dd "
    "mark i footer script".split()
)
ATTRIBUTES = set(
    "charset http-equiv content name lang class id href type hidden aria-label scope colspan role viewbox width height "
    "x y x1 x2 y1 y2 cx cy r rx d transform src alt".split()
)


class Page(HTMLParser):
    """Tags with their attributes, the anchors of sections, and texts by the tag that they lie in."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements are closed in their order"

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self, tag):
        return [text for name, text in self.texts if name == tag]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]


def page_of(report, **more):
    return render_page(Reading(name="model", report=report, **more))


def require_inert(page):
    """Only our elements, one script and one style, whose hashes the policy names, and nothing that is fetched."""
    parsed = Page(page)
    assert parsed.open == []
    assert {tag for tag, _ in parsed.tags} <= TAGS
    assert {name for _, attributes in parsed.tags for name in attributes} <= ATTRIBUTES
    policy = next(entry["content"] for entry in parsed.all("meta") if entry.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        (content,) = parsed.words(tag)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert all(link["href"].startswith("#") for link in parsed.all("a"))
    assert all(image["src"].startswith("data:image/") for image in parsed.all("img"))
    assert len(page.encode()) <= LARGEST
    return parsed


def test_a_whole_report_shows_every_section_in_order():
    """Warnings first."""
    parsed = require_inert(page_of(full_report(), files={"model.safetensors": 2_100_000}))

    assert parsed.sections == SECTIONS


def test_every_chart_and_every_mark_has_a_name():
    """What a screen reader says."""
    page = page_of(full_report(), files={"model.safetensors": 2_100_000})

    charts = re.findall(r"<svg[^>]*><title>([^<]+)</title>", page)
    assert len(charts) == page.count("<svg") >= 12
    assert len(set(charts)) == len(charts), "no two charts have one name"
    assert all("aria-label" in chart and chart["role"] == "img" for chart in Page(page).all("svg"))
    marks = re.findall(r'<(?:rect|circle|g) [^>]*class="mark[^>]*>(?:<title>([^<]*)</title>)?', page)
    assert marks and all(marks)


@pytest.mark.parametrize(
    "shown",
    ["8.00 MB", "2.10 MB", "2.00e-04", "1.00e-04", "0.003", "0.01", "2.1", "0.95", "90.0 %", "50.0 %", "lm_head",
     "outside of the layers", "1 min 35 s", "threshold has no effect: reasons"],
)  # fmt: skip
def test_numbers_of_charts_stand_in_tables_and_lists(shown):
    parsed = Page(page_of(full_report(), files={"model.safetensors": 2_100_000}))

    assert any(shown in text for tag in ("td", "li", "code", "b") for text in parsed.words(tag))


def test_where_answers_part_is_marked():
    parsed = Page(page_of(full_report()))

    assert parsed.words("mark") == ["red cars", "blue cars"]
    assert len(parsed.all("img")) == 1


def test_answers_that_were_not_kept_are_said_with_the_way_to_keep_them():
    report = full_report()
    del report["fidelity"]["samples"]

    page = page_of(report)

    assert "report_samples=" in page and "three red cars" not in page


def test_a_report_of_an_early_release_shows_what_it_has():
    assert require_inert(page_of(early_report())).sections == EARLY


@pytest.mark.parametrize("missing", sorted(full_report()))
def test_any_field_may_be_missing(missing):
    report = full_report()
    del report[missing]

    require_inert(page_of(report))


def test_an_empty_report_is_a_page():
    assert require_inert(page_of({})).sections == ["warnings"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_becomes_markup(text):
    parsed = require_inert(render_page(Reading(name=text, report=hostile_report(text))))

    assert parsed.sections == SECTIONS
    assert len(parsed.all("img")) == 0, "an address that is no picture is not shown"


def test_letters_of_every_language_are_kept():
    assert "数据 café 🦙" in page_of(hostile_report("数据 café 🦙"))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([10**400, -(10**400), -1, 0, float("nan"), float("inf"), -1e300, 1e300, 1e-320]),
    st.sampled_from(HOSTILE[:6]),
    st.lists(st.none(), max_size=2),
    st.just({}),
)


def places(value, path=()):
    """Paths to everything in a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from places(entry, (*path, key))


def has(holder, key):
    """Whether a value still holds something there: an earlier change may have taken it away."""
    return key in holder if isinstance(holder, dict) else isinstance(holder, list) and key < len(holder)


PLACES = list(places(full_report(layers=1, vision=1)))[1:]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), ODD), min_size=1, max_size=6))
def test_odd_values_anywhere_are_left_out(changes):
    """A report may come from anybody."""
    report = full_report(layers=1, vision=1)
    for path, value in changes:
        holder = report
        for key in path[:-1]:
            inside = isinstance(holder, dict | list) and (
                key in holder if isinstance(holder, dict) else key < len(holder)
            )
            holder = holder[key] if inside else {}
        if isinstance(holder, dict) or (isinstance(holder, list) and path[-1] < len(holder)):
            holder[path[-1]] = value

    page = page_of(report)

    require_inert(page)
    assert "nan" not in "".join(re.findall(r'(?:x|y|cx|cy|d|width|height)="[^"]*"', page))
    require_inert(render_comparison(Reading(name="a", report=report), Reading(name="b", report={})))


def test_a_deep_mixture_stays_below_the_limit():
    """Experts of a layer share a square and a row."""
    report = full_report(layers=94, vision=27)
    report["modules"] |= {
        f"decoder.layers.{n}.mlp.experts.{expert}.up_proj": report["modules"]["projector.linear"]
        for n in range(94)
        for expert in range(40)
    }

    parsed = require_inert(page_of(report))

    assert "Too large" not in str(parsed.texts)


def test_a_report_that_is_too_large_says_what_is_left_out():
    report = full_report()
    report["sites"] = [{"site": "<" * 2000, "nearest": 1, "found": 1, "chosen": 1}] * 400

    parsed = require_inert(page_of(report))

    assert parsed.sections == SECTIONS
    assert sum("Too large for this page" in text for text in parsed.words("p")) == 1


def test_two_models_stand_side_by_side():
    first, second = full_report(), early_report()
    second["bytes"]["after"] = 4_000_000

    page = render_comparison(Reading(name="four", report=first), Reading(name="eight", report=second))

    parsed = require_inert(page)
    assert parsed.sections == SECTIONS
    assert [text for text in parsed.words("td") if text.endswith("x")][:2] == ["4.00x", "2.00x"]
    assert "Not in this report." in parsed.words("p"), "the second has no encoder"


def test_the_same_report_gives_the_same_bytes():
    assert page_of(full_report()) == page_of(json.loads(json.dumps(full_report())))
