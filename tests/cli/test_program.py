"""`python -m optimum_qvlm PROGRAM`: a program runs as its own command runs it, but for the method being registered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_qvlm.cli.program import Command, Module, Script, find_program
from optimum_qvlm.errors import QVLMError
from tests.jobs import ROOT

SAY = """
import json, multiprocessing, pickle, sys, __main__

MARK = "of the program"

class Own:
    pass

def say():
    print(json.dumps({
        "name": __name__,
        "argv": sys.argv,
        "first on the path": sys.path[0],
        "mark in __main__": getattr(__main__, "MARK", None),
        "classes are pickled": type(pickle.loads(pickle.dumps(Own()))) is Own,
        "registered": "optimum_qvlm" in sys.modules,
    }))
    return 7 if "--fail" in sys.argv else None
"""
RUN = """
if __name__ == "__main__":
    sys.exit(say())
"""
SPAWN = """
import multiprocessing, sys

def registered(_):
    return "optimum_qvlm" in sys.modules

def main():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(registered, [0]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where a package `shown` is installed, with a module to run, two commands, and a script beside it."""
    folder = tmp_path_factory.mktemp("site")
    package, information = folder / "shown", folder / "shown-1.dist-info"
    package.mkdir()
    information.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SAY + RUN)
    (package / "command.py").write_text(SAY)
    (package / "workers.py").write_text(SPAWN)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: shown\nVersion: 1\n")
    commands = "say-it = shown.command:say\nspawn-it = shown.workers:main\n"
    (information / "entry_points.txt").write_text(f"[console_scripts]\n{commands}")
    (folder / "script.py").write_text(SAY + RUN)
    return folder


@pytest.fixture
def python(site, tmp_path):
    """Runs a fresh Python in an empty folder, for which `shown` is installed."""

    def run(*words):
        paths = os.pathsep.join([str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("kind", ["module", "script"])
def test_a_program_sees_what_it_sees_without_us(python, site, kind):
    """Programs look at `__main__` and `sys.argv`, and pickle what they define."""
    words = ["-m", "shown"] if kind == "module" else [site / "script.py"]
    words += ["--fail", "-x", "--help"]

    alone, here = python(*words), python("-m", "optimum_qvlm", *words)

    expected, said = json.loads(alone.stdout), json.loads(here.stdout)
    assert (expected.pop("registered"), said.pop("registered")) == (False, True)
    assert said == expected
    assert (here.returncode, alone.returncode) == (7, 7)


def test_a_command_runs_as_its_script_runs_it(python, tmp_path):
    """The working folder is not on the path of a command, so that a folder named `datasets` there does no harm."""
    done = python("-m", "optimum_qvlm", "say-it", "--fail", "--version")

    said = json.loads(done.stdout)
    assert done.returncode == 7, done.stderr
    assert said["argv"] == ["say-it", "--fail", "--version"]
    assert said["registered"] and said["classes are pickled"]
    assert Path(said["first on the path"]) not in (tmp_path, Path())


def test_workers_that_a_command_spawns_know_the_method(python):
    """A pool that loads models in its workers would meet an unknown method there."""
    assert python("-m", "optimum_qvlm", "spawn-it").stdout.split() == ["True"]


def test_a_program_that_is_not_there_is_said_in_one_line(python):
    done = python("-m", "optimum_qvlm", "say-ti")

    assert done.returncode == 2
    assert done.stdout == ""
    message = done.stderr.strip().splitlines()
    assert message == [
        f"python -m optimum_qvlm: error: there is no program 'say-ti' for {sys.executable}; did you mean say-it?"
    ]


def test_kinds_of_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").touch()
    Path("tool").write_text(f"#!{sys.executable}\n")

    assert isinstance(find_program(["transformers", "serve"]), Command)
    assert isinstance(find_program(["-m", "json.tool"]), Module)
    assert isinstance(find_program(["mine.py"]), Script)
    assert isinstance(find_program(["./tool"]), Script)


@pytest.mark.parametrize(
    "words, message",
    [
        (["no-such-thing"], r"no program 'no-such-thing' for .*; install its package there, or give the path"),
        (["json"], r"no program 'json' for .*; .* put -m before it: python -m optimum_qvlm -m json"),
        ([""], r"no program '' for"),
        (["--serve"], r"unknown option --serve; options of the program come behind its name"),
        (["-m"], r"-m needs the name of a module"),
        (["-m", "no_such_thing"], r"no module 'no_such_thing' for .*; install its package there"),
        (["-m", "no_such.thing"], r"module 'no_such.thing' cannot be found for .*No module named 'no_such'"),
        (["-m", "email"], r"'email' is a package without a __main__ module"),
        (["./shell"], r"shell is not a Python program"),
        (["./binary"], r"binary is not a Python program"),
        (["./elsewhere"], r"elsewhere runs in another Python \(/opt/other/bin/python3\).*install optimum-qvlm there"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_way_out(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("shell").write_text("#!/bin/sh\nexit 0\n")
    Path("binary").write_bytes(b"\x7fELF\x00\xff")
    Path("elsewhere").write_text("#!/opt/other/bin/python3\n")

    with pytest.raises(QVLMError, match=message):
        find_program(words)
