"""Saves that are killed just before one of their renames, links, unlinks or new folders, and what is found then.

    python -m tests.hf.saving.kill_points OLD NEW HOME WAY SHARD EVERY

saves the model in NEW over copies of the folder OLD, which are made in HOME, and prints one JSON object a kill. A fork
saves, and kills itself by SIGKILL; the process that started it then loads the folder. WAY is `exchange`, or `files`,
where the target is the working folder of the process, so that it cannot be exchanged. SHARD is the new model's
`max_shard_size`. With EVERY above 1, only each EVERY-th step is a kill, and the renames.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import optimum_qvlm  # noqa: F401

STEPS = ("os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir")
NOTE = "user/note.txt"


def load(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors of the model in a folder, and the chat template of its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model.state_dict(), AutoProcessor.from_pretrained(folder).chat_template


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are the same."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def save(model: Any, target: Path, way: str, shard: str, steps: Path, kill_at: int | None) -> None:
    """Save in this process, which ends with it; every step is noted, and that of number `kill_at` never done."""
    done = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event in STEPS:
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            os.write(noted, f"{event} {arguments[0]}\n".encode())

    noted = os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if way == "files":
        os.chdir(target)
    sys.addaudithook(watch)
    model.save_pretrained("." if way == "files" else target, max_shard_size=shard)
    os._exit(0)


def forked(*arguments: Any) -> int:
    """The status with which a fork that saves ended."""
    child = os.fork()
    if child == 0:
        try:
            save(*arguments)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def verdict(target: Path, states: dict[str, tuple[dict[str, torch.Tensor], str]]) -> tuple[str, str]:
    """Whose tensors and whose chat template are found: old, new, or what went wrong."""
    try:
        tensors, template = load(target)
    except Exception as error:  # whatever it is, it is the finding
        return f"{type(error).__name__}: {str(error)[:200]}", "-"
    model = next((name for name, (other, _) in states.items() if same(tensors, other)), "neither")
    return model, next((name for name, (_, other) in states.items() if template == other), "neither")


def main(old: Path, new: Path, home: Path, way: str, shard: str, every: int) -> None:
    """Kill a save at its steps, one after the other."""
    states = {"old": load(old), "new": load(new)}
    model = AutoModelForImageTextToText.from_pretrained(new)
    target, steps = home / "target", home.parent / "steps"

    def reset() -> None:
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(old, target)
        (target / NOTE).parent.mkdir()
        (target / NOTE).write_text("mine")

    reset()
    assert forked(model, target, way, shard, steps, None) == 0
    events = steps.read_text().splitlines()
    renames = {number for number, event in enumerate(events) if event.startswith("os.rename")}
    kills = sorted({*range(0, len(events), every), *renames, *(number + 1 for number in renames)} - {len(events)})
    for number in [*kills, None]:
        reset()
        status = forked(model, target, way, shard, steps, number)
        actual, template = verdict(target, states)
        outcome = {
            "step": number,
            "event": "end" if number is None else events[number],
            "killed": os.WIFSIGNALED(status),
            "model": actual,
            "template": template,
            "note": (target / NOTE).read_text() if (target / NOTE).exists() else None,
        }
        print(json.dumps(outcome), flush=True)
    assert forked(model, target, way, shard, steps, None) == 0
    last = {"left": sorted(path.name for path in home.iterdir()), "files": sorted(os.listdir(target))}
    print(json.dumps(last | {"model": verdict(target, states)[0], "steps": len(events)}), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4], sys.argv[5], int(sys.argv[6]))
