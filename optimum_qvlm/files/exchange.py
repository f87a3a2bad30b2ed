"""Two folders exchanged in one step, and the mount points that forbid it."""

import ctypes
import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def exchange(first: Path, second: Path) -> None:
    """Give each of two paths of one file system the content of the other, in one step.

    Python has no name for this system call, `renameat2` of Linux. Audit hooks see it as a rename.

    Raises:
        OSError: the system, or the file system, cannot do it, or does not allow it; nothing was changed.
    """
    call = _renameat2()
    if call is None:
        raise OSError(errno.ENOSYS, "this system cannot exchange folders", str(first), None, str(second))
    sys.audit("os.rename", str(first), str(second), -1, -1)
    if call(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))


def is_mount_point(path: Path) -> bool:
    """Whether another file system, or a folder from elsewhere, is mounted at `path`."""
    points = mount_points()
    return os.path.ismount(path) if points is None else str(path) in points


def mount_points() -> frozenset[str] | None:
    """Paths of everything that is mounted for this process; None where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return None
    return frozenset(os.fsdecode(re.sub(rb"\\([0-7]{3})", _unescape, line.split(b" ")[4])) for line in lines)


def _unescape(octal: re.Match[bytes]) -> bytes:
    return bytes([int(octal[1], 8)])


def _renameat2() -> Any:
    """The function of the C library, None where it has none."""
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call
