"""The packaged calibration set: distinct, balanced, readable, small, and free to pass on."""

import hashlib
import json
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

SET = Path(str(files("optimum_qvlm.data"))) / "default"
KINDS = {"photo", "chart", "text", "document"}
FREE_LICENSES = {"Apache-2.0", "CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "Public domain"}
MOST_BYTES = 3_000_000
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")


def read_lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SET / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def samples() -> list[dict[str, str]]:
    return read_lines("samples.jsonl")


@pytest.fixture(scope="module")
def passages() -> list[dict[str, str]]:
    return read_lines("passages.jsonl")


def test_enough_distinct_pictures(samples):
    """The method calibrates on 64 pairs; a picture that occurs twice would count twice."""
    hashes = {hashlib.sha256((SET / sample["image"]).read_bytes()).hexdigest() for sample in samples}

    assert len(hashes) == len(samples) >= 64


def test_questions_about_pictures_are_distinct(samples):
    """A pair that occurs twice would weigh twice, and an empty answer has no loss."""
    pairs = {(sample["image"], sample["question"]) for sample in samples}

    assert len(pairs) == len(samples)
    assert all(sample["question"].strip() and sample["answer"].strip() for sample in samples)


@pytest.mark.parametrize("count", [8, 16, 32, 64])
def test_every_prefix_has_the_four_kinds_in_equal_parts(samples, count):
    """Users who calibrate on fewer samples take the first ones."""
    kinds = Counter(sample["kind"] for sample in samples[:count])

    assert kinds == dict.fromkeys(KINDS, count // 4)


def test_answers_are_short_and_long(samples):
    """Models answer in one word and in paragraphs; both have to be calibrated."""
    words = [len(WORD.findall(sample["answer"])) for sample in samples]

    assert 20 <= sum(words) / len(words) <= 60
    assert sum(count <= 5 for count in words) >= 4
    assert sum(count >= 100 for count in words) >= 6


def test_pictures_decode_in_many_sizes(samples):
    """Processors that keep the aspect ratio make sequences of different lengths from them."""
    sizes = set()
    for sample in samples:
        with Image.open(SET / sample["image"]) as image:
            sizes.add(image.convert("RGB").size)

    assert len(sizes) >= 32
    assert min(width / height for width, height in sizes) < 0.75
    assert max(width / height for width, height in sizes) > 1.5
    assert all(224 <= side <= 800 for size in sizes for side in size)


def test_no_file_is_left_over_and_the_set_is_small(samples):
    """Everything here travels in the wheel."""
    images = {path.relative_to(SET).as_posix() for path in (SET / "images").iterdir()}

    assert images == {sample["image"] for sample in samples}
    assert sum(path.stat().st_size for path in SET.rglob("*") if path.is_file()) <= MOST_BYTES


def test_licences_allow_redistribution_and_sources_are_named(samples):
    """Attribution is a condition of some licences, and nobody should have to ask for the others."""
    text = (SET / "LICENSES.md").read_text(encoding="utf-8")

    assert {sample["license"] for sample in samples} <= FREE_LICENSES
    assert [sample["source"] for sample in samples if sample["source"] not in text] == []


def test_photographs_are_credited_one_by_one(samples):
    """CC BY asks for the author, the licence's address and a link to the original."""
    text = (SET / "LICENSES.md").read_text(encoding="utf-8")
    sections = dict(section.split("\n", 1) for section in text.split("\n## ")[1:])

    photographs = [sample for sample in samples if sample["kind"] == "photo"]
    assert sections.keys() == {Path(sample["image"]).name for sample in photographs}
    for sample in photographs:
        section = sections[Path(sample["image"]).name]
        assert f"Licence: {sample['license']}, <http" in section
        assert re.search(r"^- Author: \S", section, re.MULTILINE)
        assert re.search(r"^- Link: <http", section, re.MULTILINE)


def test_passages_are_long_enough_and_distinct(passages):
    """Text-only models get as many samples as vision-language models, without padding for the most part."""
    words = [len(WORD.findall(passage["text"])) for passage in passages]

    assert len({passage["text"] for passage in passages}) == len(passages) >= 64
    assert 80 <= min(words)
    assert max(words) <= 300


def test_first_passages_are_of_many_kinds(passages):
    """Prefixes are what small calibrations use."""
    assert len({passage["kind"] for passage in passages[:16]}) >= 6
