"""Clocks, ratios and the rate of a copy."""

import itertools
import time

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_the_copy_is_counted_both_ways(monkeypatch):
    monkeypatch.setitem(timing.COPIED_BYTES, "cpu", 2**20)
    ticks = itertools.count()

    rate = timing.copy_bandwidth(CPU, lambda: next(ticks) * 1e-3 * timing.COPIES)

    assert rate == pytest.approx(2 * 2**20 / 1e-3)


def test_a_ratio_is_that_of_pairs():
    """A round in which the whole machine was slow says as much as any other."""
    assert timing.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 2.0]) == 2.0


def test_a_process_that_sleeps_takes_no_processor_time():
    """Which is what a machine that others use needs."""
    wall, own = timing.clock_of("cpu"), timing.clock_of("cpu", cpu_time=True)
    waited = -wall(), -own()
    time.sleep(0.2)

    assert wall() + waited[0] >= 0.2 > own() + waited[1]
