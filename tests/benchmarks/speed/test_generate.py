"""The benchmark of generation decodes what the model itself generates, with every cache."""

import argparse
import threading

import pytest
import torch

from benchmarks.shapes import llama, model_of
from benchmarks.speed import generate
from optimum_qvlm.hf.format.modules import packed_bytes, quantized_modules
from optimum_qvlm.modules.fused import FusedLinear
from optimum_qvlm.modules.qlinear import QuantLinear
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


def arguments(**settings):
    chosen = {"tokens": 2, "rounds": 1, "device": "cpu", "cpu_time": False, "static_cache": False}
    chosen |= {"image": False, "compile": False, "baselines": ["bf16"], "turns": None, "rotated": False}
    return argparse.Namespace(**{**chosen, **settings})


def test_nobody_measures_while_somebody_compiles(tmp_path):
    """Those that compile do so together; who measures waits for all of them, and is alone."""
    file, seen = tmp_path / "turns", []

    def measure():
        with generate.turn(file, alone=True):
            seen.append("measured")

    waiting = threading.Thread(target=measure)
    with generate.turn(file, alone=False), generate.turn(file, alone=False):
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive() and seen == []
    waiting.join(timeout=30)

    assert seen == ["measured"]


def make_model(scheme):
    return model_of(llama(64, 96, 2, 2, 1, 1200), scheme, torch.bfloat16, "cpu")


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

    found = generate.measure(variants, 5, batch, arguments(static_cache=static_cache))

    assert [speed.variant for speed in found] == ["bf16", "w4a16"]
    assert found[0].decode_ratio == {"bf16": 1.0} and found[0].prompt == 5
    assert found[1].megabytes < found[0].megabytes
    assert not any(speed.peak_megabytes < speed.megabytes for speed in found)  # unknown outside Linux


def test_a_batch_is_the_same_prompt_several_times():
    one = generate.prompt_of(None, 7, 1, arguments())["input_ids"]

    assert torch.equal(generate.prompt_of(None, 7, 3, arguments())["input_ids"], one.expand(3, -1))


@pytest.mark.parametrize("random", [False, True], ids=["loaded", "random weights"])
def test_fused_variants_hold_and_compute_what_the_others_do(llama_folder, monkeypatch, random):
    """Both are there to take turns, with the same weights, so that only the number of products differs."""
    monkeypatch.setitem(generate.SHAPES, "tiny", lambda: tiny_llama().config)
    asked = arguments(model=str(llama_folder), random_init="tiny" if random else None, baselines=["fp32"], fuse=True)
    asked.schemes, asked.dtype, asked.exact_decode = ["w4a16"], "fp32", False

    variants = generate.build_all(asked)

    fused = [sum(isinstance(module, FusedLinear) for module in model.modules()) for model in variants.values()]
    assert list(variants) == ["fp32", "w4a16", "w4a16 fused"]
    assert fused == [0, 0, 5 * variants["fp32"].config.num_hidden_layers]
    assert generate.checkpoint_bytes(variants["w4a16 fused"]) == generate.checkpoint_bytes(variants["w4a16"])
    ids = torch.randint(10, 50, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (variants[name](input_ids=ids).logits for name in ("w4a16 fused", "w4a16"))
    assert torch.equal(found, expected)


def test_rotations_are_not_dropped_in_silence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["generate.py", "--model", str(tmp_path), "--rotated"])

    with pytest.raises(SystemExit):
        generate.main()

    assert "--rotated is for --random-init" in capsys.readouterr().err


@pytest.mark.parametrize("rotated", [False, True])
def test_random_weights_are_rotated_where_calibrated_ones_would_be(monkeypatch, rotated):
    """Every site over a power of two that fits, applied before the product."""
    monkeypatch.setitem(generate.SHAPES, "tiny", lambda: tiny_llama().config)
    asked = arguments(random_init="tiny", model=None, fuse=False, rotated=rotated, schemes=["w4a8"])
    asked.dtype, asked.exact_decode = "fp32", False

    model = generate.build_all(asked)["w4a8"]

    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    sizes = {module.format.rotation for module in linears}
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert sizes == {None} if not rotated else all(size > 1 and size & (size - 1) == 0 for size in sizes)
    assert all(module.in_features % (module.format.rotation or 1) == 0 for module in linears)
