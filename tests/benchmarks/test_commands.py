"""Every benchmark says what it takes, and is in the table of benchmarks."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
STARTED_BY_OTHERS = "benchmarks.quality.peer_runner"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown(monkeypatch, capsys, name):
    """With what the benchmark says about itself in front."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, name, raising=False)

    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__")

    shown = capsys.readouterr().out
    first = (FOLDER.parent / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8").split("\n")[0].strip('"')
    assert ended.value.code == 0
    assert shown.startswith("usage: ") and first in " ".join(shown.split())


def test_a_clone_needs_no_path():
    """The package need not be installed, nor anything be set."""
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--list", "--device", "cpu"]
    ran = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "benchmarks.speed.gpu_linears" in ran.stdout


def test_the_table_names_every_command():
    named = re.findall(r"^\| `python -m (\S+)` \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted([*named, STARTED_BY_OTHERS]) == COMMANDS


def test_pages_name_commands_that_are_there():
    pages = [ROOT / "README.md", FOLDER / "README.md", *(ROOT / "docs").rglob("*.md")]
    names = {name for page in pages for name in re.findall(r"-m (benchmarks\.\S+\w)", page.read_text(encoding="utf-8"))}
    assert len(names) > 9
    assert names <= set(COMMANDS)
