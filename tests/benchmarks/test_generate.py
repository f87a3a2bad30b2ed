"""The benchmark of whole models: what its columns count."""

import argparse

import generate
import pytest
import torch
from shapes import llama, random_from_config

from optimum_qvlm.hf.checkpoint import packed_bytes, quantized_modules


def arguments(**settings):
    chosen = {"batch": 1, "tokens": 2, "rounds": 1, "device": "cpu", "cpu_time": False, "static_cache": False}
    return argparse.Namespace(**{**chosen, "image": False, "compile": False, "baselines": ["bf16"], **settings})


def make_model(scheme):
    return random_from_config(llama(64, 96, 2, 2, 1, 1200), scheme, torch.bfloat16, "cpu")


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "w3a16"])
def test_saved_bytes_are_those_of_the_packed_form(scheme):
    """Whatever the layout in memory adds."""
    model = make_model(scheme)
    modules = quantized_modules(model)
    held = {id(p): p for module in modules.values() for p in module.parameters()}
    rest = packed_bytes(model) - sum(p.nbytes for p in held.values())
    packed = sum(t.nbytes for module in modules.values() for t in module.packed_state().values())

    assert modules
    assert generate.checkpoint_bytes(model) == rest + packed
    assert generate.checkpoint_bytes(make_model(None)) == packed_bytes(make_model(None))


@pytest.mark.parametrize("static_cache", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_variant_is_measured_against_the_baseline(static_cache, batch):
    variants = {"bf16": make_model(None), "w4a16": make_model("w4a16")}

    found = generate.measure(variants, 5, arguments(static_cache=static_cache, batch=batch))

    assert [speed.variant for speed in found] == ["bf16", "w4a16"]
    assert found[0].decode_ratio == {"bf16": 1.0} and found[0].prompt == 5
    assert found[1].megabytes < found[0].megabytes
    assert not any(speed.peak_megabytes < speed.megabytes for speed in found)  # unknown outside Linux


def test_a_batch_is_the_same_prompt_several_times():
    one = generate.prompt_of(None, 7, arguments())["input_ids"]

    assert torch.equal(generate.prompt_of(None, 7, arguments(batch=3))["input_ids"], one.expand(3, -1))
