"""The benchmark of generation decodes what the model itself generates, with every cache."""

import argparse

import generate
import pytest
import shapes
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


def test_fused_variants_hold_and_decode_what_the_others_do():
    """The same random weights in both, so that only the number of products differs; biases are stored as they are."""
    config = tiny_llama().config
    alone, fused = (shapes.model_of(config, "w4a16", torch.float32, "cpu", fuse=fuse) for fuse in (False, True))

    assert any(isinstance(module, generate.FusedLinear) for module in fused.modules())
    assert generate.checkpoint_bytes(fused) == generate.checkpoint_bytes(alone)
    ids = torch.randint(10, 50, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(fused(input_ids=ids).logits, alone(input_ids=ids).logits)


@pytest.mark.parametrize("random", [False, True], ids=["loaded", "random weights"])
def test_each_scheme_is_there_fused_too(llama_folder, monkeypatch, random):
    """Beside the one that is not, so that both take turns."""
    monkeypatch.setitem(shapes.SHAPES, "tiny", lambda: tiny_llama().config)
    asked = argparse.Namespace(model=str(llama_folder), random_init="tiny" if random else None, baselines=["fp32"])
    asked.schemes, asked.dtype, asked.device, asked.exact_decode, asked.fuse = (
        ["w4a16", "w8a8"],
        "fp32",
        "cpu",
        False,
        True,
    )

    variants = generate.build_all(asked)

    fused = {
        name: sum(isinstance(m, generate.FusedLinear) for m in model.modules()) for name, model in variants.items()
    }
    linears = 5 * variants["fp32"].config.num_hidden_layers
    assert fused == {"fp32": 0, "w4a16": 0, "w4a16 fused": linears, "w8a8": 0, "w8a8 fused": linears}
