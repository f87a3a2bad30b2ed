"""Datasets of any size and form, read a row at a time."""

import logging
import random
import tracemalloc

import datasets
import pytest
from PIL import Image

from optimum_qvlm.data.loader import LoaderOptions, make_batches, make_prompts, read_dataset, read_held_out
from optimum_qvlm.data.rows import draw, draw_others
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.errors import DataError

OPTIONS = LoaderOptions(num_samples=4, batch_size=4, max_length=512, seed=3)


class Lazy:
    """A dataset that makes its rows when they are read."""

    column_names = ("text",)

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, place):
        return {"text": f"text {place}"}


@pytest.mark.parametrize("size", [10**7, 10**12])
def test_drawing_from_a_large_dataset_takes_no_memory(size):
    tracemalloc.start()
    _, samples = read_dataset(Lazy(size), OPTIONS, wants_images=False)
    held_out = read_held_out(Lazy(size), OPTIONS, wants_images=False, count=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len({sample.text for sample in [*samples, *held_out]}) == 12
    assert peak < 1_000_000


@pytest.mark.parametrize("count", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("taken", [1, 5, 30])
@pytest.mark.parametrize("seed", range(4))
def test_the_draw_is_that_of_a_list(count, taken, seed):
    """Which samples a seed stands for must not change between releases."""
    everything = list(range(count))
    listed = everything if count <= taken else sorted(random.Random(seed).sample(everything, taken))
    left = [place for place in everything if place not in listed]
    others = sorted(random.Random(seed).sample(left, min(8, len(left))))

    assert draw(count, taken, seed) == listed
    assert draw_others(count, listed, 8, seed) == others


def chat(*parts, answer="yes"):
    return [
        {"role": "user", "content": list(parts)},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def test_messages_in_a_table_are_those_that_were_put_in(processor):
    """Arrow gives every part every key, None where there was none, and images as bytes."""
    picture = Image.effect_noise((20, 30), 50).convert("RGB")
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    messages = chat({"type": "image", "image": picture}, {"type": "text", "text": "how many?"})
    rows = datasets.Dataset.from_list(
        [{"messages": messages}], features=datasets.Features({"messages": datasets.List(turn)})
    )

    (stored,), (given,) = (read_dataset(d, OPTIONS, wants_images=True)[1] for d in (rows, [messages]))

    assert [part.keys() for part in stored.parts()] == [part.keys() for part in given.parts()]
    first, second = (make_batches([sample], processor, OPTIONS)[0] for sample in (stored, given))
    assert all(first[name].equal(second[name]) for name in second)


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("placed", [True, False])
def test_a_column_of_images_fills_the_places_in_the_messages(column, placed):
    pictures = [Image.new("RGB", (4, 4), colour) for colour in (("red", "blue") if column == "images" else ("red",))]
    text = {"type": "text", "text": "Same?"}
    parts = [*({"type": "image"} for _ in pictures), text] if placed else [text]

    sample = read_sample({"messages": chat(*parts), column: pictures if column == "images" else pictures[0]}, "s")

    assert [part["type"] for part in sample.parts()] == ["image"] * len(pictures) + ["text"]
    assert [image.open().tobytes() for image in sample.images] == [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize("places, images", [(1, 0), (2, 1), (1, 2)])
def test_places_and_images_must_be_as_many(places, images):
    record = {"messages": chat(*[{"type": "image"}] * places), "images": [Image.new("RGB", (4, 4))] * images}

    with pytest.raises(
        DataError, match=rf'dataset\[7\]: {places} parts of .* "images" has {images}; give one for each'
    ):
        read_sample(record, "dataset[7]")


@pytest.mark.parametrize("answers, first", [(["one", "1"], "one"), ([None, 2], "2"), ([], None), (("a",), "a")])
def test_of_several_answers_the_first_is_taken(answers, first):
    assert read_sample({"question": "q", "answer": answers}, "s").answer == first


def test_that_answers_were_left_out_is_said(caplog):
    records = [{"question": "a", "answer": "x"}, {"question": "b", "answer": ["y", "z"]}]
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        read_dataset(records, OPTIONS, wants_images=False)
    finally:
        logger.removeHandler(caplog.handler)

    assert "1 of 2 samples list several answers, dataset[1] the first of them" in caplog.text


def test_an_answer_that_is_no_text_is_refused():
    with pytest.raises(DataError, match=r"s: answer must be a text or a list of texts, got a dict"):
        read_sample({"question": "q", "answer": {"text": ["a"]}}, "s")


@pytest.mark.parametrize(
    "text", ["is there a 4 in the square? " * 3000, "no" + " " * 60_000 + "yes" * 5000], ids=["long", "gap"]
)
@pytest.mark.parametrize("part", ["question", "answer", "text"])
def test_texts_are_cut_before_they_are_tokenized(text, part, processor, monkeypatch):
    """To the same tokens as after it; ten megabytes would else take a minute."""
    record = {"text": text} if part == "text" else {"question": "q", "answer": "a"} | {part: text}
    sample = read_sample(record, "s")
    (cut,) = make_batches([sample], processor, OPTIONS)
    monkeypatch.setattr("optimum_qvlm.data.rendering.LETTERS_PER_TOKEN", 10**6)
    (whole,) = make_batches([sample], processor, OPTIONS)

    assert all(cut[name].equal(whole[name]) for name in whole)
    monkeypatch.undo()
    assert make_prompts([sample], processor, OPTIONS)["input_ids"].shape[1] < 20_000
