"""Folders of one holder each, and what is done with those whose holder died."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "lock"
"""Name of the file in a held folder that is locked as long as its holder lives."""

ATTEMPTS = 100
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems that know no locks say."""


@contextmanager
def held_folder(home: Path, prefix: str, *, mode: int = 0o777) -> Iterator[Path]:
    """A new folder `home/prefix...` with a name of its own, locked until the end, when it is removed.

    The operating system gives the lock up when the process dies, however it dies and on whichever machine; no
    process number is asked. The umask is taken off `mode`. Where the file system knows no locks, the folder has no
    lock file, and nobody else ever removes it.

    Raises:
        OSError: it cannot be made.
    """
    folder, lock = _claim(home, prefix, mode)
    try:
        yield folder
    finally:
        _dispose(folder, lock)


def sweep(home: Path, prefix: str) -> None:
    """Remove the folders `home/prefix...` whose holder is dead. Those that cannot be judged or removed stay."""
    with suppress(OSError), os.scandir(home) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                _sweep_one(Path(entry.path))


@contextmanager
def locked(path: Path, *, seconds: float) -> Iterator[None]:
    """Hold the lock file `path`, which is removed at the end; without effect where the file system knows no locks.

    Raises:
        OSError: the file cannot be made, or others held it for `seconds`.
    """
    lock = _acquired(path, seconds)
    try:
        yield
    finally:
        if lock is not None:
            _give_up(path, lock)


def _claim(home: Path, prefix: str, mode: int) -> tuple[Path, FileLock | None]:
    """A sweep may take the folder away as long as it is not locked; then another one is made."""
    for _ in range(ATTEMPTS):
        folder = home / f"{prefix}{secrets.token_hex(8)}"
        folder.mkdir(mode=mode)
        try:
            access = stat.S_IMODE(folder.stat().st_mode)
            lock = _acquired(folder / LOCK, 10)
            with suppress(FileNotFoundError):
                folder.chmod(access)  # where a sweep took it, filelock has made it anew, open to all
        except (FileNotFoundError, FileExistsError, Timeout):
            continue
        except BaseException:
            _dispose(folder, None)
            raise
        if folder.exists() if lock is None else (folder / LOCK).exists():
            return folder, lock
        if lock is not None:
            lock.release()
    raise OSError(errno.EBUSY, "every new folder was taken away at once", str(home))


def _acquired(path: Path, seconds: float) -> FileLock | None:
    lock = FileLock(path, timeout=seconds, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        path.unlink(missing_ok=True)
        return None
    return lock


def _sweep_one(folder: Path) -> None:
    if not (folder / LOCK).exists():
        with suppress(OSError):
            folder.rmdir()  # works only where it is empty: its holder died, or is about to lock it and makes another
        return
    with suppress(OSError):
        lock = _acquired(folder / LOCK, 0)
        if lock is not None:
            _dispose(folder, lock)


def _dispose(folder: Path, lock: FileLock | None) -> None:
    """Remove a folder, its lock last: what is left of a removal that was killed can be swept too."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != LOCK:
                with suppress(OSError):
                    os.unlink(entry.path)
    if lock is not None:
        _give_up(folder / LOCK, lock)
    with suppress(OSError):
        folder.rmdir()


def _give_up(path: Path, lock: FileLock) -> None:
    """Remove a lock file while it is held, so that whoever waits for it sees that it is gone, and release it.

    Windows removes no open file: there it is released first.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError:
        lock.release()
        with suppress(OSError):
            path.unlink()
    else:
        lock.release()
