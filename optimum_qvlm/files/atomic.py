"""A temporary folder beside a target, and the step that makes its content the target's."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from optimum_qvlm.files.exchange import exchange, is_mount_point, mount_points
from optimum_qvlm.files.held import held_folder, locked, sweep

WORK_MARK = ".qvlm-saving-"
NOTHING = re.compile(r"(?!)")
LONGEST_NAME = 200
LOCK_SECONDS = 600.0
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems say that cannot be asked to write something down now."""


@contextmanager
def work_folder(target: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """An empty folder beside the target, removed at the end; left-overs of processes that died are removed too.

    Every call gets a folder of its own, which lies in one that is locked as long as the call lasts. It takes mode,
    group and access lists of a target that exists; else the umask is taken off `mode`. Where the target is a mount
    point, or its parent cannot be written, the folder is made inside the target: renames work within one mount only.
    Parents of the target that had to be made are removed again where nothing was published.

    Raises:
        OSError: no folder can be made there.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        home, prefix = _home(target), _prefix(target)
        sweep(home, prefix)
        with held_folder(home, prefix, mode=mode) as held:
            work = held / "content"
            work.mkdir(mode=mode)
            if target.is_dir():
                with suppress(OSError):
                    _take_after(work, target)
                work.chmod(work.stat().st_mode | 0o700)
            yield work
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def publishing(target: Path) -> Iterator[None]:
    """Hold the target against other saves, and Ctrl-C and SIGTERM back, for the steps that change it.

    Raises:
        OSError: others held it for ten minutes.
    """
    with locked(_home(target) / f"{_prefix(target)}lock", seconds=LOCK_SECONDS), uninterrupted():
        yield


def publish(work: Path, target: Path, *, dropped: re.Pattern[str] = NOTHING) -> bool:
    """Make `work` the target in one step: at every instant the target is wholly the old one or wholly the new one.

    Files of the target that `work` has no new ones for, and whose names at the top do not match `dropped`, are
    linked into `work` first. What is left in `work` afterwards is the old target. The files in `work` should have
    been written down by `sync_tree`.

    Returns False, with the target as it was and perhaps links in `work`, where the step is not possible: a mount
    point in or at the target, the working folder of this process in or at it, a file system or a system that cannot
    exchange folders or link files.
    """
    if not target.exists():
        os.rename(work, target)
        _sync_at_last(target.parent)
        return True
    ours = files_below(work)
    try:
        _require_movable(target)
        _link(target, work, ours, dropped)
        _take_after(work, target)
        os.utime(work)
        _sync(work)
        exchange(work, target)
    except OSError:
        return False
    _carry_over(work, target, ours, dropped)
    _sync_at_last(target)
    _sync_at_last(target.parent)
    return True


def files_below(folder: Path) -> list[str]:
    """Names of all files in a folder and its folders, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def replace_file(path: Path, content: bytes, *, work: Path) -> None:
    """Write a file as a whole, and down to the disk: others see the old content or the new one.

    `work` is a folder of the same mount.
    """
    fresh = work / f"{path.name}.{secrets.token_hex(4)}"
    fresh.write_bytes(content)
    _sync(fresh)
    _sync(path.parent)
    os.replace(fresh, path)
    _sync_at_last(path.parent)


def sync_tree(folder: Path) -> None:
    """Have all files and folders below, and the folder itself, written down to the disk.

    Raises:
        OSError: the disk is full or broken.
    """
    for path in folder.rglob("*"):
        if path.is_dir() or path.is_file():
            _sync(path)
    _sync(folder)


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


def _home(target: Path) -> Path:
    """Where temporary folders for the target are made."""
    inside = target.is_dir() and (is_mount_point(target) or not os.access(target.parent, os.W_OK))
    return target if inside else target.parent


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}{WORK_MARK}"


def _take_after(folder: Path, model: Path) -> None:
    """Give a folder the owner, group, mode, times and access lists of another one."""
    owner = model.stat()
    if (folder.stat().st_uid, folder.stat().st_gid) != (owner.st_uid, owner.st_gid):
        os.chown(folder, owner.st_uid, owner.st_gid)
    shutil.copystat(model, folder)


def _require_movable(target: Path) -> None:
    """Refuse a target whose exchange would pull the ground from under somebody's feet."""
    points = mount_points()
    if points is None or any(Path(point).is_relative_to(target) for point in points):
        raise OSError(errno.EBUSY, "something is mounted there", str(target))
    if Path.cwd().is_relative_to(target):
        raise OSError(errno.EBUSY, "it is the working folder of this process", str(target))


def _rest(
    folder: Path, ours: Collection[str], dropped: re.Pattern[str], below: str = ""
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything in a folder that is neither ours nor dropped, by its relative name, folders before their content."""
    with os.scandir(folder / below) as entries:
        for entry in entries:
            name = os.path.join(below, entry.name)
            if name in ours or dropped.fullmatch(name) is not None:
                continue
            yield name, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _rest(folder, ours, dropped, name)


def _link(old: Path, new: Path, ours: Collection[str], dropped: re.Pattern[str]) -> None:
    """Give everything in `old` that is neither ours nor dropped a second name in `new`."""
    folders = []
    for name, entry in _rest(old, ours, dropped):
        if entry.is_dir(follow_symlinks=False):
            (new / name).mkdir(exist_ok=True)
            folders.append(name)
        else:
            os.link(entry.path, new / name, follow_symlinks=False)
    for name in reversed(folders):
        _take_after(new / name, old / name)
        _sync(new / name)


def _carry_over(old: Path, new: Path, ours: Collection[str], dropped: re.Pattern[str]) -> None:
    """Move what others put into `old`, or replaced there, after it had been linked."""
    for name, entry in _rest(old, ours, dropped):
        if entry.is_dir(follow_symlinks=False):
            (new / name).mkdir(exist_ok=True)
        elif not os.path.lexists(new / name) or not os.path.samestat(os.lstat(entry.path), os.lstat(new / name)):
            with suppress(FileNotFoundError):
                os.replace(entry.path, new / name)


def _sync_at_last(folder: Path) -> None:
    """The same after the step that counts: everybody sees its result already, so that a broken disk undoes nothing."""
    with suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    """Have a file's content, or a folder's names, written down to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise
    finally:
        os.close(number)
