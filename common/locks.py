"""Locks among processes, also of several machines on one disk; the system frees those of a process that is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from monai.utils import optional_import

fcntl, HAS_FCNTL = optional_import("fcntl")  # not on Windows

NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
_told: set[str] = set()


@contextmanager
def locked(folder: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `name` of a folder for the block; yields whether it is held, which is False only without `wait`.

    The lock is a hidden file in the folder, which is removed afterwards. Where the disk offers no locks, or is full,
    this is said once on stderr, and the block runs as if it held the lock; where the folder cannot be written at all,
    the block will say so itself.
    """
    path = folder / f".lock-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    try:
        file = _acquire(path, wait)
    except BlockingIOError:
        yield False
        return
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            _tell(folder, error.strerror or str(error))
        yield True
        return
    try:
        yield True
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            file.close()


def _acquire(path: Path, wait: bool) -> IO[bytes] | None:
    """The open, locked file; None where the system has no locks. Raises BlockingIOError where another has it."""
    if not HAS_FCNTL:
        _tell(path.parent, "not offered by this system")
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass  # whoever held it has removed the file: lock a new one
        except BaseException:
            file.close()
            raise
        file.close()


def _tell(folder: Path, cause: str) -> None:
    if str(folder) not in _told:
        _told.add(str(folder))
        message = f"{folder}: no locks here ({cause}); start only one process on this folder at a time"
        print(message.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
