"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
STALE_S = 3600  # what was not written on for so long was left by a process that was killed


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, with the same suffixes; move it to `path` if the block succeeds.

    A link at `path` is replaced, not what it leads to. Several processes may do so at once; the last one counts.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_partial(path.parent, path.name, STALE_S)
    temporary = _partial(path.parent, path.name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def partial_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, in which `name` is made; what is still there after the block is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    discard_partial(parent, name, STALE_S)
    partial = _partial(parent, name)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard_partial(parent: Path, name: str, older_s: float = 0) -> None:
    """Remove what processes that were killed left of `name`: all of it, or what nothing was written on for a while."""
    pattern = re.compile(rf"{re.escape(PARTIAL)}[0-9a-f]{{16}}-{re.escape(name)}")
    for path in parent.glob(f"{PARTIAL}*") if parent.is_dir() else ():
        if not pattern.fullmatch(path.name):
            continue
        try:
            if time.time() - path.lstat().st_mtime < older_s:
                continue
        except FileNotFoundError:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _partial(parent: Path, name: str) -> Path:
    return parent / f"{PARTIAL}{secrets.token_hex(8)}-{name}"
