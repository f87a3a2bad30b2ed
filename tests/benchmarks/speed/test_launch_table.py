"""The command that measures launch shapes, as far as a machine without a GPU can run it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed import launch_table
from optimum_qvlm.kernels.triton import tiles


@pytest.fixture
def line():
    return {"kernel": "decode", "architecture": 90, "bits": 4, "up_to": 8, "size": "many"} | {
        "tokens": 8, "rows": 16, "slices": 4, "warps": 4, "stages": 3,
    }  # fmt: skip


def test_the_fastest_candidate_is_taken(line):
    """By the geometric mean over weights: no single one decides."""
    fast = {"rows": 32, "slices": 2, "warps": 2, "stages": 3}

    def measure(trial):
        return 10.0 if fast.items() <= dict(trial.shape).items() else 20.0

    found, gain = launch_table.choose(line, measure, 0.03)

    assert found == line | fast
    assert gain == pytest.approx(0.5)


def test_a_gain_within_the_margin_changes_nothing(line):
    """Noise would rewrite the table on every run."""
    own = {name: line[name] for name in launch_table.SHAPE if name in line}

    found, gain = launch_table.choose(line, lambda trial: 20.0 if dict(trial.shape) == own else 19.8, 0.03)

    assert (found, gain) == (line, 0.0)


def test_what_cannot_be_launched_is_never_taken(line):
    own = {name: line[name] for name in launch_table.SHAPE if name in line}

    found, _ = launch_table.choose(line, lambda trial: 20.0 if dict(trial.shape) == own else math.inf, 0.03)

    assert found == line


@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_a_device_gets_lines_of_its_own_from_those_that_it_takes(architecture):
    """So that a first measurement has somewhere to start."""
    lines = launch_table.own_lines(list(tiles.table()), architecture)

    assert {line["architecture"] for line in lines} == {architecture}
    decoding = next(line for line in lines if line["kernel"] == "decode")
    shape = {name: decoding[name] for name in launch_table.SHAPE if name in decoding}
    assert tiles.DecodeTile(**shape) == tiles.decode_tile(architecture, 4, 16, 1, 16)


def test_every_line_has_candidates_that_fit_it():
    """Its own shape comes first, and none takes more tokens than the line is for."""
    for line in tiles.table():
        shapes = list(launch_table.candidates(line))

        assert all(line[name] == shapes[0][name] for name in shapes[0])
        assert line.get("up_to", "any") == "any" or all(shape["tokens"] <= line["up_to"] for shape in shapes)


def test_the_shipped_table_is_what_would_be_written(tmp_path):
    """One line each, so that a change reads well."""
    path = tmp_path / "tiles.json"
    path.write_text("old")

    launch_table.write_table(list(tiles.table()), path)

    assert path.read_text() == launch_table.TABLE.read_text()
    assert len(json.loads(path.read_text())) == len(path.read_text().splitlines()) - 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiles.json"]


def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", launch_table.__name__]
    root, hidden = Path(__file__).parents[3], {"CUDA_VISIBLE_DEVICES": ""}

    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=hidden)

    assert ran.returncode == 2
    assert "can only be measured on a CUDA device" in ran.stderr
