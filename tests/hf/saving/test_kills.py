"""A save that is killed at any step leaves a folder from which the old model loads or the new one, never neither."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.jobs import ROOT, load, quantize

PROCESSOR = ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
SHARDS = {"one": "50GB", "few": "150KB", "many": "60KB"}


@pytest.fixture(scope="module")
def models(llava_folder, bundled_folder, tmp_path_factory) -> Path:
    """Folders `old-...` and `new-...` of two quantized models with processors, in one file and in shards. Read only.

    Their schemes differ, so that the configuration of one does not fit the weights of the other.
    """
    home = tmp_path_factory.mktemp("models")
    for name, factor, scheme in (("old", 1.0, "w4a8"), ("new", 1.5, "w8a8")):
        plain = load(llava_folder)
        with torch.no_grad():
            plain.get_input_embeddings().weight.mul_(factor)
        plain.save_pretrained(home / name)
        for file in PROCESSOR:
            shutil.copyfile(bundled_folder / file, home / name / file)
        template = home / name / "chat_template.jinja"
        template.write_text(f"{{# {name} #}}" + template.read_text())
        quantized = quantize(home / name, scheme, method="rtn")
        for shards, size in SHARDS.items():
            quantized.save_pretrained(home / f"{name}-{shards}", max_shard_size=size)
    return home


def kill(models: Path, home: Path, way: str, before: str, after: str, *, every: int) -> tuple[list[dict], dict]:
    """Outcomes of kills, and of a whole save after the last of them."""
    old, new = models / f"old-{before}", models / f"new-{after}"
    words = [old, new, home / "home", way, SHARDS[after], every]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hf.saving.kill_points", *map(str, words)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *outcomes, last = map(json.loads, done.stdout.splitlines())
    actual = Counter((outcome["model"], outcome["template"]) for outcome in outcomes)
    print(f"{way}, {before} -> {after}: {len(outcomes) - 1} kills at {last['steps']} steps: {dict(actual)}")
    return outcomes, last


def require_whole(outcomes: list[dict], last: dict, expected_files: set[str]) -> None:
    """Old or new after each kill, both seen; files of the user stay; the next save leaves no trace of a killed one."""
    *killed, end = outcomes
    assert all(outcome["killed"] for outcome in killed) and not end["killed"]
    assert [outcome for outcome in outcomes if outcome["model"] not in ("old", "new")] == []
    assert killed[0]["model"] == "old" and end["model"] == "new"
    assert {outcome["note"] for outcome in outcomes} == {"mine"}
    assert last["left"] == ["target"]
    assert last["model"] == "new"
    assert set(last["files"]) == expected_files | {"user"}


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder))


@pytest.mark.parametrize("way", ["exchange", "files"])
def test_killed_at_renames(models, tmp_path, way):
    """Over shards, by one file; all steps are in the heavy test."""
    outcomes, last = kill(models, tmp_path, way, "many", "one", every=1000)

    require_whole(outcomes, last, names_in(models / "new-one"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("before, after", [("one", "one"), ("one", "many"), ("many", "one"), ("many", "few")])
@pytest.mark.parametrize("way", ["exchange", "files"])
def test_killed_at_every_step(models, tmp_path, way, before, after):
    outcomes, last = kill(models, tmp_path, way, before, after, every=1)

    require_whole(outcomes, last, names_in(models / f"new-{after}"))
    if way == "exchange":
        assert all(outcome["model"] == outcome["template"] for outcome in outcomes), "the processor is the model's"
