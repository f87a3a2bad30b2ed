"""A family without chat template: its processor takes images and text, and answers apart."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)

from optimum_qvlm.cli import chat
from optimum_qvlm.data.loader import LoaderOptions, make_labelled_batches
from optimum_qvlm.data.sample import read_sample
from optimum_qvlm.errors import DataError
from tests.jobs import quantize
from tests.tiny_families import FAMILIES
from tests.tiny_models import IMAGE_SIDE, PATCHES


def record(shade=0, **changes):
    return {"image": Image.new("RGB", (30, 20), (shade, 9, 99)), "question": "how many?", "answer": "two"} | changes


@pytest.fixture(scope="module")
def folder(bundled_folder, tmp_path_factory):
    """A tiny PaliGemma with a processor. Read only."""
    target = tmp_path_factory.mktemp("paligemma")
    tokenizer = AutoProcessor.from_pretrained(bundled_folder).tokenizer
    tokenizer.chat_template = None
    images = SiglipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})
    images.image_seq_length = PATCHES
    processor = PaliGemmaProcessor(images, tokenizer)
    config = FAMILIES["paligemma"].config().to_dict()
    size, token = len(processor.tokenizer), processor.image_token_id
    config["text_config"]["vocab_size"] = size
    config |= {"image_token_id": token, "image_token_index": token, "vocab_size": size}
    config = AutoConfig.for_model(**config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(target)
    processor.save_pretrained(target)
    return target


def test_it_is_calibrated_in_its_own_form(folder):
    """Image tokens, begin, question, line break, and the answer as what is to be learnt."""
    processor = AutoProcessor.from_pretrained(folder)
    options = LoaderOptions(num_samples=4, batch_size=4, max_length=512, seed=0)
    samples = [read_sample(record(), "s"), read_sample(record(question="is there a four?"), "s")]

    (batch,) = make_labelled_batches(samples, processor, options)

    expected = processor(
        text=["<image>how many?", "<image>is there a four?"],
        images=[[record()["image"]]] * 2,
        suffix=["two", "two"],
        return_tensors="pt",
        padding=True,
    )
    assert batch["input_ids"].shape == expected["input_ids"].shape
    for name in ("input_ids", "pixel_values", "token_type_ids", "labels"):
        rows = expected[name]
        if name != "pixel_values":  # the processor pads on its tokenizer's side
            kept = expected["attention_mask"].bool()
            assert [r[k].tolist() for r, k in zip(rows, kept, strict=True)] == [
                r[k].tolist() for r, k in zip(batch[name], batch["attention_mask"].bool(), strict=True)
            ]
        else:
            assert rows.equal(batch[name])


def test_samples_of_all_kinds_are_calibrated_on_and_the_image_is_asked_about(folder, tmp_path):
    model = quantize(folder, dataset=[record(), record(9, answer=None), {"text": "a text"}, record(200)], batch_size=4)

    assert model.hf_quantizer.report["calibration"]["samples"] == 4
    processor = AutoProcessor.from_pretrained(folder)
    first, second = (chat.render(processor, [record(shade)["image"]], "how many?") for shade in (0, 255))
    assert int((first["input_ids"] == processor.image_token_id).sum()) == PATCHES
    with torch.no_grad():
        assert not torch.equal(model(**first).logits, model(**second).logits)


def test_chat_shows_the_image_to_the_model(folder, tmp_path, capsys):
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))

    chat.answer(model, processor, [record()["image"]], "how many?", 2)

    assert seen


def test_a_question_without_the_image_that_the_family_needs_is_answered_or_refused(folder):
    processor = AutoProcessor.from_pretrained(folder)

    inputs = chat.render(processor, [], "how many?")

    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 0
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(DataError, match="the processor left the images out"):
        chat.require_images(model, inputs)
