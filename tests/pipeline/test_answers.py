"""The model's own answers, for samples that come without."""

import pytest
from PIL import Image

from optimum_qvlm.data.loader import LoaderOptions
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.pipeline.answers import ANSWER_TOKENS, fill_answers
from tests.jobs import load
from tests.plans import CPU

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def model():
    """The bundled model; it must be loaded once only. Read only."""
    from tests.conftest import ROOT

    return load(ROOT / "examples" / "tiny_vlm")


def make_sample(colour: str, answer: str | None = None, question: str = "what colour?") -> Sample:
    content = [{"type": "image", "image": Image.new("RGB", (32, 32), colour)}, {"type": "text", "text": question}]
    return Sample(messages=({"role": "user", "content": content},), answer=answer)


def fill(model, samples, processor, batch=2):
    options = LoaderOptions(num_samples=64, batch_size=batch, max_length=512, seed=0)
    return fill_answers(model, samples, processor, options, layers=[], device=CPU)


def test_answers_that_are_there_stay(model, processor):
    samples = [make_sample("red", "mauve"), make_sample("blue", "")]

    assert fill(model, samples, processor) == samples


def test_plain_texts_need_no_answer(model, processor):
    samples = [Sample(text="Once upon a time")]

    assert fill(model, samples, processor) == samples


def test_missing_answers_are_filled_in_order(model, processor):
    samples = [
        make_sample("red"),
        make_sample("green", "given"),
        Sample(text="t"),
        make_sample("blue", question="why?"),
    ]

    filled = fill(model, samples, processor)

    assert [sample.messages for sample in filled] == [sample.messages for sample in samples]
    assert (filled[1], filled[2]) == (samples[1], samples[2])
    assert all(isinstance(filled[n].answer, str) for n in (0, 3))


def test_answers_are_those_that_the_model_generates(model, processor):
    sample = make_sample("red")
    inputs = processor.apply_chat_template(
        [dict(message) for message in sample.messages],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
    expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert fill(model, [sample], processor)[0].answer == expected.strip()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_size_of_a_batch_does_not_change_answers(model, processor, batch):
    """Prompts of different lengths are padded on the left, which generation must not see."""
    samples = [
        make_sample(colour, question=q) for colour in COLOURS for q in ("what colour?", "how many digits are there?")
    ]

    filled = fill(model, samples, processor, batch)

    assert [sample.answer for sample in filled] == [fill(model, [sample], processor)[0].answer for sample in samples]


def test_samples_of_the_user_stay_as_they_are(model, processor):
    sample = make_sample("red")

    fill(model, [sample], processor)

    assert sample.answer is None
