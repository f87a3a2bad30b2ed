"""Families of vision-language models in vLLM: towers, projectors and decoders under the names that it gives them."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from optimum_qvlm import QVLMConfig
from tests.servers.conftest import said_by_server
from tests.servers.families import PROCESSORS, save_family
from tests.tiny_models import IMAGE_SIDE

KEPT = {"internvl": ["multi_modal_projector"]}
"""What vLLM computes by plain linears, in full precision."""


def pictures(count):
    return [Image.effect_noise((IMAGE_SIDE, IMAGE_SIDE), 60 + 20 * number).convert("RGB") for number in range(count)]


def said_by_transformers(folder, question):
    load = AutoModelForImageTextToText.from_pretrained
    model = load(folder, dtype=torch.float32, quantization_config=QVLMConfig(decode_tokens=0))
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question["question"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    inputs = processor(text=[text], images=[question["image"]], return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_family_answers_as_in_transformers(serve, family, tmp_path):
    save_family(family, tmp_path / "full")
    config = QVLMConfig("w4a8", method="rtn", modules_to_not_convert=KEPT.get(family))
    load = AutoModelForImageTextToText.from_pretrained
    load(tmp_path / "full", dtype=torch.float32, quantization_config=config).save_pretrained(tmp_path / "quantized")
    questions = [{"image": picture, "question": f"how many, {n}?"} for n, picture in enumerate(pictures(4))]

    with serve(tmp_path / "quantized") as client:
        answers = [said_by_server(client, question) for question in questions]

    assert answers == [said_by_transformers(tmp_path / "quantized", question) for question in questions]
    assert len({*answers}) > 1, "the picture changes nothing, so that nothing is tested"
