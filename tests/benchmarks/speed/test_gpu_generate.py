"""The benchmark of `generate` asks processes in turns, of models as `from_pretrained` leaves them."""

import argparse
import sys

import pytest

from benchmarks.shapes import SHAPES, llama
from benchmarks.speed import gpu_generate
from optimum_qvlm.hf.quantizer import QVLMQuantizer
from optimum_qvlm.modules.fused import FusedLinear
from optimum_qvlm.modules.qlinear import QuantLinear


@pytest.fixture
def shape(monkeypatch):
    """A model of a few thousand weights."""
    monkeypatch.setitem(SHAPES, "tiny", lambda: llama(64, 96, 2, 2, 1, 1200))
    return "tiny"


@pytest.mark.parametrize("mode", gpu_generate.MODES)
def test_a_model_with_its_quantizer_is_what_is_measured(shape, mode):
    model = gpu_generate.make(shape, "w4a8-rotated-fused", "cpu")
    generation = gpu_generate.Generation(model, argparse.Namespace(device="cpu", tokens=2, text=4))

    assert isinstance(model.hf_quantizer, QVLMQuantizer) and model.hf_quantizer.is_compileable
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert any(isinstance(linear, FusedLinear) for linear in linears)
    assert {linear.format.rotation for linear in linears} <= {32, 64}
    assert generation.warm(mode)["warm"] > 0
    assert generation.round(mode)["first"] > 0
    assert {"host", "kernels", "kernel_seconds", "peak_bytes"} == set(generation.cost(mode))
    assert generation.memory(mode)["bytes"] > 0


def test_an_unfused_variant_is_not_fused(shape):
    model = gpu_generate.make(shape, "w8a8", "cpu")

    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_ratios_are_those_of_pairs_of_one_round():
    """The whole machine may be slow for a while."""
    base = [{"first": 1.0, "token": 0.1}, {"first": 3.0, "token": 0.3}, {"first": 2.0, "token": 0.2}]
    rounds = [{"first": each["first"] / 2, "token": each["token"] / 4} for each in base]

    words = gpu_generate.line("plain", "x w4a8", rounds, base).split()

    assert words == ["plain", "x", "w4a8", "1000.0", "2.00x", "20.0", "4.00x", "50.00", "25.00"]


@pytest.mark.slow
def test_a_variant_that_fails_ends_nobody_else(monkeypatch, capfd):
    """A library that is not installed, or lacks a kernel."""
    arguments = "--device cpu --shapes smollm2-135m --variants bf16 nothing w4a8 --modes plain --text 2 --tokens 1"
    monkeypatch.setattr(sys, "argv", ["gpu_generate.py", *arguments.split(), "--rounds", "1"])

    gpu_generate.main()

    lines = [line.split()[2] for line in capfd.readouterr().out.splitlines() if line.startswith("plain")]
    assert lines == ["bf16", "w4a8"]
