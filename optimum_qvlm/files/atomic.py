"""A temporary folder beside a target, and the step that makes its content the target's."""

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

WORK_MARK = ".qvlm-saving-"


@contextmanager
def work_folder(target: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """A folder beside the target, removed at the end; left-overs of processes that died are removed too.

    Where the target is a mount point, or its parent cannot be written, the folder is made inside the target:
    renames work within one file system only. Parents of the target that had to be made are removed again when the
    work fails or is interrupted.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = _make(target, mode)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def publish(work: Path, target: Path, stale: re.Pattern[str]) -> list[str]:
    """Move all files into the target, configuration last, and remove files of an earlier save that match `stale`.

    A target that does not exist yet appears in one step. Returns the names of the files, relative to the target.
    """
    files = sorted((path for path in work.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json")
    names = [path.relative_to(work) for path in files]
    with uninterrupted():
        if not target.exists():
            os.rename(work, target)
            return [str(name) for name in names]
        for name in names:
            destination = target / name
            destination.parent.mkdir(exist_ok=True)
            os.replace(work / name, destination)
        for path in target.iterdir():
            if stale.fullmatch(path.name) and Path(path.name) not in names:
                path.unlink()
    return [str(name) for name in names]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for a moment, and deliver them at the end; elsewhere than in the main thread no-op.

    For a few renames, between which a folder would be half of the old save and half of the new one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        held.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None and handler is not signal.SIG_IGN:
            before[number] = signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in held:
            signal.raise_signal(caught)


def _make(target: Path, mode: int) -> Path:
    home = target.parent
    if target.is_dir() and (target.stat().st_dev != home.stat().st_dev or not os.access(home, os.W_OK)):
        home = target
    prefix = f".{target.name}{WORK_MARK}"
    for left in home.glob(f"{prefix}*"):
        if not _alive(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)
    work = home / f"{prefix}{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=mode)
    return work


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError, OverflowError):
        return True
    return True
