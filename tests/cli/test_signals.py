"""What is left of a run that was stopped: nothing, or after SIGKILL one named folder that the next run removes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimum_qvlm.files.atomic import WORK_MARK

MODEL = Path(__file__).parents[2] / "examples" / "tiny_vlm"
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Saving takes a moment longer, so that a signal can come in between.
SLOW_SAVING = """
import sys, time
from optimum_qvlm.hf.saving import write as writing
real = writing.render_card

def slow(facts):
    print("saving", file=sys.stderr, flush=True)
    time.sleep(60)
    return real(facts)

writing.render_card = slow
from optimum.commands.optimum_cli import main
sys.argv[0] = "optimum-cli"
main()
"""


def start(*words, slow_saving=False):
    """The command in a process group of its own, as a terminal starts it."""
    entry = ["-c", SLOW_SAVING] if slow_saving else ["-m", "optimum.commands.optimum_cli"]
    command = [sys.executable, *entry, "export", "qvlm", "--model", MODEL, "--device", "cpu", *words]
    return subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )


def wait_for(process, mark):
    """Read stderr until it says `mark`; returns what was said."""
    said = ""
    deadline = time.monotonic() + 120
    while mark not in said and time.monotonic() < deadline:
        piece = process.stderr.read(1)
        assert piece != "", said
        said += piece
    assert mark in said
    return said


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("mark", ["vision layer 0", "saving"], ids=["calibrating", "saving"])
def test_a_stopped_run_leaves_nothing(tmp_path, number, code, mark):
    options = ["--method", "rtn"] if mark == "saving" else ["--num-samples", 16]
    process = start(*options, tmp_path / "parent" / "out", slow_saving=mark == "saving")
    wait_for(process, mark)

    process.send_signal(number)
    _, rest = process.communicate(timeout=60)

    assert process.returncode == code
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_one_named_folder_that_the_next_run_removes(tmp_path):
    process = start("--method", "rtn", tmp_path / "out", slow_saving=True)
    wait_for(process, "saving")

    process.kill()
    process.communicate(timeout=60)

    [left] = tmp_path.iterdir()
    assert left.name.startswith(f".out{WORK_MARK}")

    again = start("--method", "rtn", tmp_path / "out")
    again.communicate(timeout=200)
    assert again.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
