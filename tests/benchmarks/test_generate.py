"""The benchmark of generation decodes what the model itself generates, with every cache."""

import argparse

import generate
import pytest
import torch

from tests.tiny_models import tiny_llama


@pytest.mark.parametrize("static", [False, True], ids=["growing cache", "static cache"])
def test_rounds_decode_what_the_model_generates(static):
    """A cache that is used again for the next round must forget the last one."""
    model = tiny_llama().eval()
    asked = argparse.Namespace(device="cpu", static_cache=static, compile=False, tokens=5, cpu_time=False, image=False)
    inputs = {"input_ids": torch.randint(10, 50, (2, 7), generator=torch.Generator().manual_seed(0))}
    decoder = generate.Decoder(model, inputs, asked)

    for _ in range(2):
        prefill, decode = decoder.round()

        assert prefill > 0 and decode > 0
        wanted = model.generate(**inputs, attention_mask=torch.ones(2, 7).long(), max_new_tokens=6, do_sample=False)
        assert torch.equal(decoder.token, wanted[:, -1:])
