"""Families of vision-language models in vLLM: towers, projectors and decoders under the names that it gives them."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from optimum_qvlm import QVLMConfig
from tests.servers.conftest import NEW_TOKENS, choice_of_server, said_by_server
from tests.servers.families import PROCESSORS, save_family
from tests.tiny_models import IMAGE_SIDE

KEPT = {"internvl": ["multi_modal_projector", "vision_tower"]}
"""What vLLM computes by plain linears, whatever the checkpoint says."""

PARTS = ("--chat-template-content-format", "openai")
"""Lets vLLM give templates the parts of a message, pictures in their places."""


def pictures(count):
    return [Image.effect_noise((IMAGE_SIDE, IMAGE_SIDE), 60 + 20 * number).convert("RGB") for number in range(count)]


def inputs_of(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question["question"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return processor(text=[text], images=[question["image"]], add_special_tokens=False, return_tensors="pt")


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)


def exactly(folder):
    """With activations rounded at every number of tokens."""
    return load(folder, quantization_config=QVLMConfig(decode_tokens=0))


def first_scores(model, processor, questions):
    """Log probability of the first token of each greedy answer."""
    with torch.no_grad():
        logits = [model(**inputs_of(processor, question)).logits[0, -1] for question in questions]
    return torch.stack([row.log_softmax(-1).max() for row in logits])


def first_scores_of_server(client, questions):
    choices = [choice_of_server(client, question) for question in questions]
    return torch.tensor([choice.logprobs.content[0].logprob for choice in choices])


@pytest.fixture
def asked():
    return [{"image": picture, "question": f"how many, {n}?"} for n, picture in enumerate(pictures(4))]


@pytest.fixture
def saved(tmp_path):
    """Makes a model and its quantized form; gives their folders."""

    def made(family):
        save_family(family, tmp_path / "full")
        config = QVLMConfig("w4a8", method="rtn", modules_to_not_convert=KEPT.get(family))
        load(tmp_path / "full", quantization_config=config).save_pretrained(tmp_path / "quantized")
        return tmp_path / "full", tmp_path / "quantized"

    return made


@pytest.mark.parametrize("family", sorted(PROCESSORS.keys() - {"qwen3_vl"}))
def test_a_family_answers_as_in_transformers(serve, saved, asked, family):
    _, folder = saved(family)
    model, processor = exactly(folder), AutoProcessor.from_pretrained(folder)
    expected = []
    for question in asked:
        inputs = inputs_of(processor, question)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(tokens, skip_special_tokens=True).strip())

    with serve(folder, *PARTS) as client:
        answers = [said_by_server(client, question) for question in asked]
        scores = first_scores_of_server(client, asked)

    assert answers == expected
    assert (scores - first_scores(model, processor, asked)).abs().max() < 5e-3


def test_qwen3_vl_differs_from_transformers_as_in_full_precision(serve, saved, asked):
    """vLLM's own forward of it does, by one percent of a probability."""
    full, quantized = saved("qwen3_vl")
    processor = AutoProcessor.from_pretrained(full)
    distances = []
    for folder, model in ((full, load(full)), (quantized, exactly(quantized))):
        with serve(folder, *PARTS) as client:
            scores = first_scores_of_server(client, asked)
        distances.append((scores - first_scores(model, processor, asked)).abs().mean())

    assert distances[1] < 2 * distances[0] + 1e-3
