"""Files of git-annex (DataLad, OpenNeuro) and Git LFS whose content was not fetched: dead links, or short texts."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import ImageFileError

ANNEX_LINK = re.compile(r"(^|[/\\])annex[/\\]objects[/\\]")
ANNEX_TEXT = b"/annex/objects/"
LFS_TEXT = b"version https://git-lfs.github.com/spec/"


def check_fetched(path: Path) -> None:
    """Raises ImageFileError where a file, or one in a folder, stands for content that is elsewhere."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if tool := pointer_of(file):
            fetch = "git annex get (or datalad get)" if tool == "git-annex" else "git lfs pull"
            fact = f"only a pointer of {tool}, the content was not fetched"
            raise ImageFileError(file, fact, f"fetch it with {fetch}")


def pointer_of(file: Path) -> str | None:
    """`git-annex` or `Git LFS`, if a file is a pointer of it."""
    if file.is_symlink():
        gone = not file.exists() and ANNEX_LINK.search(os.readlink(file))  # noqa: PTH115 - as it is, not as a path
        return "git-annex" if gone else None
    if not file.is_file() or file.stat().st_size > 2**15:  # git-annex' own limit of a pointer
        return None
    with file.open("rb") as content:
        start = content.read(64)
    if start.startswith(ANNEX_TEXT):
        return "git-annex"
    return "Git LFS" if start.startswith(LFS_TEXT) else None
