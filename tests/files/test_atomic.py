"""Folders of one holder each, and targets that are wholly old or wholly new."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optimum_qvlm.files import held
from optimum_qvlm.files.atomic import WORK_MARK, publish, publishing, replace_file, uninterrupted, work_folder
from optimum_qvlm.files.exchange import exchange, is_mount_point, mount_points
from tests.jobs import ROOT, contents

HOLD = """
import sys, time
from pathlib import Path
from optimum_qvlm.files.atomic import work_folder
with work_folder(Path(sys.argv[1])) as work:
    (work / "half").write_bytes(b"half")
    print(work, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def target(tmp_path) -> Path:
    """A folder with two files."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("old a")
    (folder / "b").write_text("old b")
    return folder


def holder(target: Path) -> tuple[subprocess.Popen, Path]:
    """Another process that works on the target, and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, target],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return process, Path(process.stdout.readline().strip())


def test_every_call_has_a_folder_of_its_own(target):
    """Also in one thread: nothing is told apart by process numbers."""
    with work_folder(target) as first, work_folder(target) as second:
        (first / "x").write_text("1")
        assert list(second.iterdir()) == []

    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_folders_of_the_living_stay_and_those_of_the_dead_go(target):
    """Whatever number the other process has: in another container it may be any, or that of this one."""
    process, theirs = holder(target)
    try:
        with work_folder(target):
            pass
        assert (theirs / "half").read_bytes() == b"half"
    finally:
        process.kill()
        process.communicate()

    assert theirs.exists()
    with work_folder(target):
        assert not theirs.parent.exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("owner", [1, 999999999, "someone", os.getpid()], ids=["1", "high", "name", "own"])
def test_folders_without_a_lock_stay(target, owner):
    """Nobody can tell whose they are."""
    theirs = target.parent / f".out{WORK_MARK}{owner}"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")

    with work_folder(target):
        pass

    assert (theirs / "file").read_text() == "theirs"


def test_threads_get_folders_while_others_sweep(target):
    """A sweep that comes between the making of a folder and its lock takes it away; then another one is made."""
    actual: list[Path] = []

    def work(_: int) -> None:
        with work_folder(target) as folder:
            (folder / "x").write_text("x")
            actual.append(folder)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(600)))

    assert len(set(actual)) == 600
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_file_system_without_locks_does(target, monkeypatch):
    """Some of clusters answer ENOSYS. A left-over is then nobody's to remove."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))

    with work_folder(target) as work, publishing(target):
        assert not (work.parent / held.LOCK).exists()
        (work / "a").write_text("new a")
        assert publish(work, target)

    assert contents(target) == {"a": b"new a", "b": b"old b"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700)], ids=oct)
def test_a_new_target_has_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with work_folder(tmp_path / "out") as work:
            publish(work, tmp_path / "out")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_an_old_target_keeps_its_mode(target):
    target.chmod(0o2751)

    with work_folder(target) as work:
        assert publish(work, target)

    assert stat.S_IMODE(target.stat().st_mode) == 0o2751


@pytest.mark.parametrize("name", ["out[1]*?", "o ut\n", "x" * 255], ids=["pattern", "space", "long"])
def test_every_name_can_be_a_targets(tmp_path, name):
    for _ in range(2):
        with work_folder(tmp_path / name) as work:
            (work / "a").write_text("a")
            assert publish(work, tmp_path / name)

    assert contents(tmp_path) == {f"{name}/a": b"a"}


def test_a_target_is_exchanged_and_what_is_not_ours_stays(target):
    """The same files, not copies: links, times and modes are as they were."""
    (target / "deep" / "er").mkdir(parents=True)
    (target / "deep" / "er" / "note").write_text("note")
    (target / "deep").chmod(0o700)
    os.utime(target / "deep", (1, 1))
    (target / "away").symlink_to("../elsewhere")
    (target / "stale-1").write_text("stale")
    note = (target / "deep" / "er" / "note").stat().st_ino
    inode = target.stat().st_ino

    with work_folder(target) as work:
        (work / "a").write_text("new a")
        assert publish(work, target, dropped=re.compile(r"stale-\d"))

    assert target.stat().st_ino != inode
    assert contents(target) == {"a": b"new a", "b": b"old b", "deep/er/note": b"note"}
    assert (target / "deep" / "er" / "note").stat().st_ino == note
    assert (stat.S_IMODE((target / "deep").stat().st_mode), (target / "deep").stat().st_mtime) == (0o700, 1)
    assert os.readlink(target / "away") == "../elsewhere"


def test_what_comes_while_the_folders_are_exchanged_stays(target):
    """A training process may write its log there. A hook acts at the last moment before the exchange."""
    acted = []

    def write(event: str, arguments: tuple) -> None:
        if event == "os.rename" and arguments[1] == str(target) and not acted:
            acted.append(event)
            (target / "log").write_text("line")
            (target / "b.tmp").write_text("newer b")
            os.replace(target / "b.tmp", target / "b")

    sys.addaudithook(write)
    with work_folder(target) as work:
        (work / "a").write_text("new a")
        assert publish(work, target)

    assert acted == ["os.rename"]
    assert contents(target) == {"a": b"new a", "b": b"newer b", "log": b"line"}


@pytest.mark.parametrize("inside", [".", "deep"])
def test_the_working_folder_of_this_process_is_not_exchanged(target, monkeypatch, inside):
    """It would be gone for this process, and with it every relative path."""
    (target / "deep").mkdir()
    monkeypatch.chdir(target / inside)

    with work_folder(target) as work:
        (work / "a").write_text("new a")
        assert not publish(work, target)

    assert contents(target) == {"a": b"old a", "b": b"old b"}
    assert Path.cwd() == (target / inside).resolve()


def test_a_system_without_the_call_leaves_the_target(target, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")

    with work_folder(target) as work:
        (work / "a").write_text("new a")
        assert not publish(work, target)

    assert contents(target) == {"a": b"old a", "b": b"old b"}


def test_a_failed_exchange_names_both_paths(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        exchange(tmp_path / "a", tmp_path / "b")

    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_mount_points_are_known(tmp_path):
    points = mount_points()

    assert points is not None and "/" in points and "/proc" in points
    assert is_mount_point(Path("/proc"))
    assert not is_mount_point(tmp_path)


def test_a_file_is_replaced_as_a_whole(target):
    with work_folder(target) as work:
        replace_file(target / "a", b"new a", work=work)
        assert list(work.iterdir()) == []

    assert contents(target) == {"a": b"new a", "b": b"old b"}


def test_publishing_waits_for_others(target):
    """Two saves that link each other's files at the same time would lose one of them."""
    order = []
    inside = threading.Event()

    def first() -> None:
        with publishing(target):
            inside.set()
            order.append("first in")
            order.append("first out")

    with publishing(target):
        thread = threading.Thread(target=first)
        thread.start()
        assert not inside.wait(0.3)
        order.append("here")
    thread.join()

    assert order == ["here", "first in", "first out"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_last_step(number):
    """Between two renames a folder is half of one save and half of another."""
    said = []
    before = signal.signal(number, lambda *_: said.append("handled"))
    try:
        with uninterrupted():
            signal.raise_signal(number)
            said.append("done")
    finally:
        signal.signal(number, before)

    assert said == ["done", "handled"]
