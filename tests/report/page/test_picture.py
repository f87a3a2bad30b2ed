"""The picture of a card: an XML file that needs no other, whatever names are in it."""

import xml.etree.ElementTree as ElementTree

import pytest

from optimum_qvlm.report.page.picture import LARGEST, render_picture
from optimum_qvlm.report.page.reading import Reading
from tests.report.page.reports import HOSTILE, full_report, hostile_report


def tags(picture):
    return {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture).iter()}


def test_sizes_closeness_and_every_linear_are_drawn():
    report = full_report()

    picture = render_picture(Reading(name="me/model", report=report))

    texts = list(ElementTree.fromstring(picture).itertext())
    assert {"me/model", "4.00x", "8.00 MB → 2.00 MB", "95.0 %"} <= set(texts)
    assert picture.count('class="mark') == len(report["modules"]) + 1


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_becomes_markup(text):
    picture = render_picture(Reading(name=text, report=hostile_report(text)))

    assert tags(picture) <= {"svg", "title", "style", "rect", "text", "g"}


def test_an_empty_report_is_a_picture_of_a_name():
    assert "model" in render_picture(Reading(name="model", report={}))


def test_maps_that_are_too_large_are_left_out():
    report = full_report(layers=1000)

    picture = render_picture(Reading(name="model", report=report))

    assert len(picture.encode()) <= LARGEST
    assert "4.00x" in picture
