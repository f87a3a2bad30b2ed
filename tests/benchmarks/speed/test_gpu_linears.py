"""The tables of single linears, on a CPU: that every cell is filled, and that a peer's failure is only a line."""

import argparse

import pytest
import torch

from benchmarks.speed import gpu_humming, gpu_linears, gpu_peers
from optimum_qvlm.errors import SpecError

CPU = torch.device("cpu")
SETTINGS = argparse.Namespace(schemes=["w4a8", "w4a8-levels-rotated"], tokens=[1, 17], rounds=1, sets=2)


def test_a_line_for_each_number_of_tokens(capsys):
    """Baseline, then time, ratio and share of a copy for each scheme."""
    gpu_linears.measure("64x128", SETTINGS, CPU, 1e9)

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [["64", "x", "128", "1"], ["64", "x", "128", "17"]]
    for line in lines:
        base, *schemes = line.split(" | ")
        assert len(schemes) == 2
        microseconds = float(base.split()[4])
        for cell in schemes:
            found, against, _ = cell.split()
            assert float(against.removesuffix("x")) == pytest.approx(microseconds / float(found), abs=0.1, rel=0.1)


def test_bytes_are_those_of_codes_and_scales():
    """The share of a copy counts what has to be read: half a byte per weight, and a scale for each group."""
    module = gpu_linears.make_linear("w4a16", 256, 512, CPU)
    assert 256 * 512 // 2 <= gpu_linears.weight_bytes(module) <= 256 * 512 // 2 + 8 * 256 * 4


def test_what_is_behind_a_scheme_is_in_the_module():
    """Scales on two levels, and a rotation over as many channels as fit."""
    plain, both = (gpu_linears.make_linear(name, 64, 192, CPU).format for name in ("w4a8", "w4a8-levels-rotated"))

    assert (plain.rotation, plain.weight.two_level) == (None, False)
    assert (both.rotation, both.weight.two_level) == (64, True)
    with pytest.raises(SpecError, match="w4a8-rotatd"):
        gpu_linears.make_linear("w4a8-rotatd", 64, 192, CPU)


def test_every_kernel_that_is_timed_is_launched_beforehand():
    settings = argparse.Namespace(shapes=["64x128"], schemes=["w4a4"], tokens=[1, 17])
    gpu_linears.launch_once(settings, CPU)


def test_a_peer_that_raises_is_a_line_and_no_end(monkeypatch, capsys):
    """Other libraries may lack a kernel for the card, the torch or the shape."""

    def unsupported(_weight):
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setitem(gpu_peers.PEERS, "torchao", unsupported)
    monkeypatch.setitem(gpu_peers.PEERS, "gemlite", lambda weight: lambda x: x @ weight.T)
    base = {}

    for name in ("bf16", "ours", "torchao", "gemlite"):
        gpu_peers.measure(name, "64x128", SETTINGS, CPU, 1e9, base)

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bf16", "bf16", "ours", "ours", "torchao", "gemlite", "gemlite"]
    assert lines[4] == "torchao          64 x 128: RuntimeError: no kernel"
    assert set(base) == {("64x128", 1), ("64x128", 17)}


def test_ours_are_timed_where_humming_raises(monkeypatch, capsys):
    """It is not installed, or has no kernel for the card; where it has, it stands behind ours."""
    monkeypatch.setattr(gpu_humming, "COLD_BYTES", 2**12)
    monkeypatch.setattr(gpu_humming, "humming_linear", lambda name, *_: {"w4a16": lambda x: x}[name])
    settings = argparse.Namespace(schemes=["w4a16", "w4a8-rotated"], tokens=[1], rounds=1)

    gpu_humming.measure("64x128", settings, CPU)

    error, line = capsys.readouterr().out.splitlines()
    assert error == "Humming, w4a8-rotated, 64 x 128: KeyError: 'w4a8-rotated'"
    assert "nan" not in line.split("|")[1] and "nan" in line.split("|")[2]


def test_an_error_of_ours_ends_the_run(monkeypatch):
    """Only what others raise is a result."""
    monkeypatch.setattr(gpu_peers, "make_linear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division"):
        gpu_peers.measure("ours", "64x128", SETTINGS, CPU, 1e9, {})
