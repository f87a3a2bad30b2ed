"""Texts that methods are compared on: where they come from, and that their parts stay apart."""

import gzip
from pathlib import Path

import pytest
import torch

from benchmarks.quality import texts
from optimum_qvlm.errors import DataError
from tests.benchmarks.quality.packages import write_package

PAGE = '.\\" Copyright\n.TH X 7\nSee\n.BR y (7).\n'


def numbers_of(text, chunked):
    """Which chunks were drawn to calibrate on."""
    return {int((chunked.chunks == batch["input_ids"]).all(dim=1).nonzero()[0]) for batch in text.calibration}


@pytest.fixture(scope="module", params=["topics", "python"])
def chunked(request):
    """Both texts that every Python has, in the bundled model's tokens."""
    folder = Path(__file__).parents[3] / "examples" / "tiny_vlm"
    return texts.chunked(folder, request.param, tokens=256)


def test_no_chunk_is_in_two_parts(chunked):
    """Whatever was tuned on the tuning quarter was not tuned on what is reported."""
    parts = (chunked.tuning, chunked.calibration, chunked.held_out)
    tuning, calibration, held_out = (set(part.tolist()) for part in parts)

    assert len(tuning) == len(chunked.chunks) // 4
    assert tuning.isdisjoint(calibration | held_out)
    assert len(tuning | calibration | held_out) == len(chunked.chunks)
    assert calibration.isdisjoint(held_out) or calibration == held_out


@pytest.mark.parametrize("tuning", [False, True])
@pytest.mark.parametrize("held_out_first", [False, True])
def test_what_is_drawn_comes_from_its_part(chunked, tuning, held_out_first):
    parts = (chunked.tuning, chunked.tuning) if tuning else (chunked.calibration, chunked.held_out)
    for seed in range(3):
        text = chunked.draw(5, 7, seed=seed, tuning=tuning, held_out_first=held_out_first)

        calibration, held_out = numbers_of(text, chunked), set(text.numbers.tolist())
        assert (len(text.calibration), len(held_out)) == (5, 7)
        assert calibration <= set(parts[0].tolist()) and held_out <= set(parts[1].tolist())
        assert calibration.isdisjoint(held_out)
        assert torch.equal(torch.cat([batch["labels"] for batch in text.held_out]), chunked.chunks[text.numbers])


def test_more_calibration_need_not_change_what_is_held_out(chunked):
    few, many = (chunked.draw(count, 4, held_out_first=True) for count in (2, 9))
    assert few.numbers.tolist() == many.numbers.tolist()


def test_a_text_that_is_too_short_says_so(chunked):
    with pytest.raises(DataError, match=r"9999 chunks to calibrate on and 1 others are more than the text has"):
        chunked.draw(9999, 1)


def test_a_package_is_read_where_it_lies(tmp_path):
    """In the order of paths, with markup and without comments; other files of the package do not count."""
    pages = {"man7/b.7": "last", "man7/a.7": PAGE, "man5/c.5": "other"}
    files = {f"usr/share/man/{name}.gz": gzip.compress(page.encode()) for name, page in pages.items()}
    write_package(tmp_path / "manpages_6.1-2_all.deb", files)

    assert texts.read("manuals", tmp_path) == ".TH X 7\nSee\n.BR y (7).\nlast"
    assert "manpages 6.1-2, sha256" in texts.described("manuals", tmp_path)


def test_prose_is_whole_paragraphs(tmp_path):
    """Without headings and index."""
    long = "A word of two. " * 20
    content = gzip.compress(f"Heading\n\n   {long[:90]}\n   {long[90:]}\n\nindex\n".encode())
    write_package(tmp_path / "jargon-text_1_all.deb", {"usr/share/doc/jargon-text/jargon.txt.gz": content})

    assert texts.read("prose", tmp_path) == " ".join(long.split())


@pytest.mark.parametrize(("name", "package"), [("manuals", "manpages"), ("prose", "jargon-text")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    """On a machine without Debian's tools or its archive."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=rf"the Debian package {package} is not in .* run `apt-get download {package}`"):
        texts.read(name, tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"<html>" * 100])
def test_a_damaged_package_is_refused(tmp_path, content):
    (tmp_path / "manpages_1_all.deb").write_bytes(content)
    with pytest.raises(DataError, match=r"manpages_1_all\.deb is no Debian package"):
        texts.read("manuals", tmp_path)


def test_another_release_of_a_package_may_lack_the_file(tmp_path):
    write_package(tmp_path / "jargon-text_9_all.deb", {"usr/share/doc/jargon-text/jargon.html": b"<p>"})
    with pytest.raises(DataError, match=r"has no file .*jargon.*another release"):
        texts.read("prose", tmp_path)
