"""One record of a user's dataset, in any form that users have."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from optimum_qvlm.data.picture import open_image
from optimum_qvlm.data.sample import Sample, read_sample
from optimum_qvlm.errors import DataError


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (6, 4), (255, 0, 0))


@pytest.fixture
def path(tmp_path, picture) -> Path:
    picture.save(tmp_path / "red.png")
    return tmp_path / "red.png"


def name_of(value: object) -> str:
    """A name for a case that is the same in every run, which the repr of a picture is not."""
    return type(value).__name__ if isinstance(value, torch.Tensor) else re.sub(r"<.*>", "picture", repr(value))


def images_of(sample: Sample) -> list[Image.Image]:
    return [image.open() for image in sample.images]


def texts_of(sample: Sample) -> list[str]:
    return [part["text"] for turn in sample.messages for part in turn["content"] if part["type"] == "text"]


@pytest.mark.parametrize("form", ["pil", "string", "path"])
@pytest.mark.parametrize("answer", ["Red.", None])
def test_image_question_answer(picture, path, form, answer):
    """Paths may be strings or Paths; the image comes before the question."""
    image = {"pil": picture, "string": str(path), "path": path}[form]

    sample = read_sample({"image": image, "question": "Which colour?", "answer": answer}, "dataset[0]")

    (turn,) = sample.messages
    assert turn["role"] == "user"
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert texts_of(sample) == ["Which colour?"]
    assert [image.getpixel((0, 0)) for image in images_of(sample)] == [(255, 0, 0)]
    assert sample.answer == answer and sample.text is None and sample.has_image


def test_no_answer_is_none():
    assert read_sample({"question": "Why?"}, "dataset[0]").answer is None


@pytest.mark.parametrize("answer, expected", [(3, "3"), (0, "0"), (False, "False"), ("", "")])
def test_answers_are_text(answer, expected):
    """Counting questions often have a number; zero is an answer."""
    assert read_sample({"question": "How many?", "answer": answer}, "dataset[0]").answer == expected


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_several_images(picture, kind, count):
    sample = read_sample({"images": kind([picture] * count), "question": "Same?"}, "dataset[0]")

    assert len(images_of(sample)) == count
    assert sample.has_image == (count > 0)


@pytest.mark.parametrize("record", [{}, {"image": None}, {"images": None}], ids=str)
def test_a_question_without_an_image(record):
    """Rows of mixed datasets have None in the image column."""
    sample = read_sample(record | {"question": "Why?"}, "dataset[0]")

    assert not sample.has_image
    assert texts_of(sample) == ["Why?"]


def test_an_empty_column_of_images_does_not_hide_the_image(picture):
    """Datasets that were joined have both columns, one of them None."""
    assert read_sample({"images": None, "image": picture, "question": "What?"}, "dataset[0]").has_image


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: tuple(m), lambda m: {"messages": m, "id": 3}])
def test_chat_messages_end_in_the_answer(picture, wrap):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Re"}, {"type": "text", "text": "d."}]},
    ]

    sample = read_sample(wrap(messages), "dataset[0]")

    assert [turn["role"] for turn in sample.messages] == ["system", "user"]
    assert texts_of(sample) == ["Be brief.", "Colour?"]
    assert sample.answer == "Red." and sample.has_image


def test_only_the_last_answer_is_the_answer():
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]

    sample = read_sample([{"role": role, "content": text} for role, text in turns], "dataset[0]")

    assert texts_of(sample) == ["One?", "Two.", "Three?"]
    assert sample.answer == "Four."


def test_a_conversation_may_end_in_the_question():
    sample = read_sample([{"role": "user", "content": "One?"}], "dataset[0]")

    assert sample.answer is None


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_images_of_messages_may_be_paths(path, key):
    """The keys that chat templates of transformers know."""
    content = [{"type": "image", key: str(path)}]

    sample = read_sample([{"role": "user", "content": content}], "dataset[0]")

    assert images_of(sample)[0].size == (6, 4)


@pytest.mark.parametrize("record", ["A passage.", {"text": "A passage.", "kind": "prose"}], ids=["text", "dict"])
def test_plain_text(record):
    assert read_sample(record, "dataset[0]") == Sample(text="A passage.")


def test_rows_of_a_dataset_are_records(picture, tmp_path):
    """The datasets library decodes images to PIL."""
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_dict(
        {"image": [picture, None], "question": ["a", "b"], "answer": ["c", None]}, features=features
    )

    first, second = (read_sample(row, "row") for row in rows)

    assert images_of(first)[0].getpixel((0, 0)) == (255, 0, 0)
    assert (first.answer, second.answer, second.has_image) == ("c", None, False)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "x", "id": 1}, r"has the keys \['id', 'prompt'\]; expected a dict with \"image\""),
        ({}, r"has the keys \[\]; expected"),
        ({"text": 3}, r"has the keys \['text'\]; expected"),
        ({"image": Image.new("RGB", (1, 1))}, r"has the keys \['image'\]; expected"),
        (3, "is a int; expected"),
        (None, "is a NoneType; expected"),
        ([], "is a list; expected"),
        (["a", "b"], "is a list; expected"),
        ([{"content": "no role"}], "is a list; expected"),
        (torch.zeros(3), "is a Tensor; expected"),
        ([{"role": "user"}], r'a chat message needs "role" and "content", got \[\'role\'\]'),
        ({"messages": []}, "holds no message before the answer"),
        ([{"role": "assistant", "content": "only me"}], "holds no message before the answer"),
        ([{"role": "user", "content": 3}], "content must be a text or a list of parts, got int"),
        ([{"role": "user", "content": None}], "content must be a text or a list of parts, got NoneType"),
        ([{"role": "user", "content": ["a"]}], "content must be a text or a list of parts, got list"),
        ({"messages": None}, "messages"),
        ({"messages": 3}, "messages"),
        ({"messages": ["hello"]}, "message"),
        ({"messages": [None]}, "message"),
        ({"question": None}, "question"),
    ],
    ids=name_of,
)
def test_other_records_are_refused_by_index(record, message):
    """The message names which record, what it is, and what is expected."""
    with pytest.raises(DataError, match=r"dataset\[17\].*" + message):
        read_sample(record, "dataset[17]")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("stored", [True, False])
def test_images_of_every_mode_become_rgb(tmp_path, mode, stored):
    """Image processors of older models fail on anything else."""
    image: object = Image.new(mode, (3, 2))
    if stored:
        image.save(tmp_path / "image.tiff")
        image = tmp_path / "image.tiff"

    actual = open_image(image, "dataset[0]")

    assert (actual.mode, actual.size) == ("RGB", (3, 2))


def test_files_are_closed_and_decoded_at_once(path):
    """Otherwise hundreds of open files, and a corrupt one is found in the middle of a calibration."""
    actual = open_image(path, "dataset[0]")
    path.unlink()

    assert actual.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "folder"])
@pytest.mark.parametrize("form", [str, Path])
def test_unreadable_images_are_refused_with_index_and_path(path, tmp_path, damage, form):
    Image.effect_noise((64, 64), 50).save(path)
    content = {"empty": b"", "text": b"no picture", "truncated": path.read_bytes()[:200]}
    if damage in content:
        path.write_bytes(content[damage])
    target = {"missing": tmp_path / "gone.png", "folder": tmp_path}.get(damage, path)

    with pytest.raises(DataError, match=rf"dataset\[17\]: the image {re.escape(str(target))} cannot be read .*replace"):
        read_sample({"image": form(target), "question": "What?"}, "dataset[17]")


@pytest.mark.parametrize("form", ["image", "images", "messages"])
def test_every_form_names_the_bad_image(form, tmp_path):
    gone = str(tmp_path / "gone.png")
    record = {
        "image": {"image": gone, "question": "q"},
        "images": {"images": [gone], "question": "q"},
        "messages": [{"role": "user", "content": [{"type": "image", "path": gone}]}],
    }[form]

    with pytest.raises(DataError, match=rf"dataset\[3\]: the image {re.escape(gone)} cannot be read"):
        read_sample(record, "dataset[3]")


@pytest.mark.parametrize(
    "image",
    [3, np.zeros((2, 2, 3)), {"bytes": None, "path": None}],
    ids=lambda image: type(image).__name__,
)
def test_other_objects_are_no_images(image):
    message = rf"dataset\[3\]: an image must be a PIL image or a file path, got {type(image).__name__}"
    with pytest.raises(DataError, match=message):
        open_image(image, "dataset[3]")
