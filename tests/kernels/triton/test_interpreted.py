"""Kernels in Triton's interpreter, in a process of their own: triton reads its switch when it is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

QUICK_TESTS = 337
SLOW_TESTS = 340
"""How many there are at least: a suite that collects nothing would pass too."""


@pytest.mark.parametrize(
    "marks, least",
    [("not slow", QUICK_TESTS), pytest.param("slow", SLOW_TESTS, marks=pytest.mark.slow)],
    ids=["quick", "slow"],
)
@pytest.mark.timeout(1800)
def test_kernels_give_what_the_definitions_give(marks, least):
    """Every scheme, group, zero point and ragged size, on a machine without a GPU."""
    folder = Path(__file__).parent / "launched"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, folder]

    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )

    print(ran.stdout[-2000:])
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-1000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None and int(passed[1]) >= least
