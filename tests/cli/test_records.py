"""Calibration files: what is read, and errors that point at the line."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from optimum_qvlm.cli.records import read_dataset, read_records
from optimum_qvlm.errors import DataError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two images, one of them in a subfolder."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    """A file with these lines; what is no string is written as JSON."""
    path = folder / "samples.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_records_come_with_absolute_image_paths(folder, monkeypatch):
    """Paths are relative to the file, not to where the command runs."""
    write(folder, {"image": "images/a.png", "question": "Wo?", "answer": "Köln", "kind": "photo"})
    monkeypatch.chdir(folder.parent)

    records = read_records(Path(folder.name) / "samples.jsonl")

    image = str((folder / "images" / "a.png").resolve())
    assert records == [{"image": image, "question": "Wo?", "answer": "Köln"}]


def test_every_form_of_record_is_read(folder):
    path = write(
        folder,
        {"images": ["b.png", "images/a.png"], "question": "q"},
        "",
        {"image": None, "question": "no picture", "answer": None},
        {"text": "a passage", "kind": "prose"},
    )

    with_images, without_image, text = read_records(path)

    assert [Path(image).name for image in with_images["images"]] == ["b.png", "a.png"]
    assert without_image == {"question": "no picture"}
    assert text == {"text": "a passage"}


def test_line_separators_inside_a_record_do_not_end_it(folder):
    """JSON allows U+2028 unescaped in strings; only newlines end a record."""
    path = write(folder, {"question": "one\u2028two"})

    assert read_records(path) == [{"question": "one\u2028two"}]


def test_byte_order_mark_and_windows_line_ends_are_fine(folder):
    path = folder / "samples.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a"}\r\n{"question": "b"}\r\n')

    assert read_records(path) == [{"question": "a"}, {"question": "b"}]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{question: 1}", "not JSON: .* at column 2"),
        ("[1, 2]", r"'\[1, 2\]' is not an object with image, question and answer"),
        ({"prompt": "x", "id": 1}, r"neither question nor text among the keys \['prompt', 'id'\]"),
        ({"question": None}, "neither question nor text"),
        ({"question": 3}, "question must be text that is not blank, got 3"),
        ({"question": "  "}, "question must be text that is not blank, got '  '"),
        ({"question": "q", "answer": ["a"]}, r"answer must be text that is not blank, got \['a'\]"),
        ({"text": ""}, "text must be text that is not blank, got ''"),
        ({"question": "q", "image": "c.png"}, "image 'c.png' is no file; paths are relative to the folder"),
        ({"question": "q", "image": 7}, "image must be a path, got 7"),
        ({"question": "q", "images": "b.png"}, "images must be a list of paths, got 'b.png'"),
        ({"question": "q", "images": ["b.png"], "image": "b.png"}, "both image and images are given"),
    ],
)
def test_errors_name_file_and_line(folder, line, message):
    path = write(folder, {"question": "fine"}, "", line)

    with pytest.raises(DataError, match=re.escape(f"{path}, line 3: ") + message):
        read_records(path)


def test_a_file_without_records_is_refused(folder):
    with pytest.raises(DataError, match=r"samples\.jsonl holds no records"):
        read_records(write(folder, "", "  "))


def test_a_file_that_is_no_text_is_refused(folder):
    path = folder / "samples.jsonl"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_records(path)


def test_names_of_presets_pass_through(folder, monkeypatch):
    monkeypatch.chdir(folder)

    assert read_dataset("scienceqa") == "scienceqa"
    assert read_dataset(None) is None


def test_files_are_read_whatever_their_suffix(folder):
    path = write(folder, {"question": "q"}).rename(folder / "samples.json")

    assert read_dataset(str(path)) == [{"question": "q"}]


@pytest.mark.parametrize(
    "name, message",
    [("missing.jsonl", r"missing\.jsonl: there is no such file"), ("images", "images is a folder; name the")],
)
def test_paths_that_are_no_file_are_refused(folder, name, message):
    with pytest.raises(DataError, match=message):
        read_dataset(str(folder / name))


@pytest.mark.parametrize(
    "line, message",
    [
        ("[" * 100_000, "nested too deep"),
        ('{"question": ' + "9" * 5000 + "}", "integer string conversion"),
        ('{"question": "a", "answer": NaN}', "holds NaN"),
        ('{"question": "a \\ud800 b"}', "question is not Unicode text"),
        ('{"question": "q", "image": "\\ud800.png"}', "image is not Unicode text"),
        ('{"question": "q", "image": "a\\u0000.png"}', "is no file"),
        ('{"question": "q", "image": "' + "a" * 5000 + '"}', "is no file"),
        ('{"question": "q", "image": "loop.png"}', "image 'loop.png' is no file"),
        ('{"question": "q", "image": "pipe.png"}', "image 'pipe.png' is no file"),
    ],
    ids=["deep", "digits", "nan", "text", "name", "zero", "long name", "loop", "pipe"],
)
def test_odd_lines_are_refused_by_their_number(tmp_path, line, message):
    """Each once ended in a traceback, or waited for ever."""
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    path = tmp_path / "samples.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")

    with pytest.raises(DataError, match=f"line 2: .*{re.escape(message)}"):
        read_dataset(str(path))


def test_a_pipe_is_no_dataset(tmp_path):
    os.mkfifo(tmp_path / "samples.jsonl")

    with pytest.raises(DataError, match="it is no regular file"):
        read_dataset(str(tmp_path / "samples.jsonl"))
