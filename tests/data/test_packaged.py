"""The packaged calibration set, as the loader hands it out."""

import pytest

from optimum_qvlm.data import packaged
from optimum_qvlm.data.loader import LoaderOptions, make_batches, read_dataset
from optimum_qvlm.errors import DataError
from tests.tiny_models import PAD_TOKEN

OPTIONS = LoaderOptions(num_samples=64, batch_size=8, max_length=512, seed=0)


def test_image_samples_are_whole():
    """64 is the default number of samples."""
    samples = packaged.image_samples()

    assert len(samples) >= 64
    for sample in samples:
        (turn,) = sample.messages
        image, question = turn["content"]
        picture = image["image"].open()
        assert picture.mode == "RGB" and min(picture.size) > 0
        assert question["text"].strip() and sample.answer and sample.answer.strip()


def test_text_samples_are_distinct_passages():
    samples = packaged.text_samples()

    assert len(samples) >= 64
    assert len({sample.text for sample in samples}) == len(samples)
    assert not any(sample.has_image for sample in samples)


@pytest.mark.parametrize("wants_images", [True, False])
def test_no_dataset_is_the_packaged_set(wants_images):
    source, samples = read_dataset(None, OPTIONS, wants_images=wants_images)

    assert source == "packaged"
    assert len(samples) == 64
    assert all(sample.has_image == wants_images for sample in samples)


def test_it_goes_through_a_processor(processor):
    """Images of all sizes, questions and answers in several languages."""
    options = LoaderOptions(num_samples=8, batch_size=4, max_length=512, seed=0)
    _, samples = read_dataset(None, options, wants_images=True)

    batches = make_batches(samples, processor, options, (processor.image_token_id,))

    assert [len(batch["input_ids"]) for batch in batches] == [4, 4]
    for batch in batches:
        assert batch["pixel_values"].shape[0] == 4
        assert bool((batch["input_ids"][:, 0] != PAD_TOKEN).all())


def test_a_damaged_installation_is_named(monkeypatch, tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"image": "gone.jpg", "question": "q", "answer": "a"}\n', encoding="utf-8")
    monkeypatch.setattr(packaged, "FOLDER", tmp_path)

    with pytest.raises(DataError, match=r"packaged sample 0: the image .*gone\.jpg cannot be read"):
        packaged.image_samples()
