"""Labelled test cohorts from folders of public images: a module and a line here for each kind.

Each is a function with the options of its command, `uad cohort KIND DATA_DIR -o DIR`, that writes DIR/cohort.csv.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..outputs import Inputs
from .glioma import make_glioma
from .headct_sprites import make_headct_sprites
from .healthy import make_healthy
from .healthy_lesions import IXI, NOVOSIBIRSK, lesion_cohort
from .oct import make_oct
from .patients import make_patients


def _reading_only(make: Callable[..., None]) -> Callable[..., None]:
    """`make`, after a look at whether it would write into the folder that it reads, or over what is linked there."""

    @functools.wraps(make)
    def checked(data_dir: Path, output: Path, **options: Any) -> None:
        there = [path for path in output.iterdir() if path.is_file()] if output.is_dir() else []
        Inputs([data_dir, *_links(data_dir)]).check([output / "cohort.csv", *there])
        make(data_dir=data_dir, output=output, **options)

    return checked


def _links(folder: Path) -> list[Path]:
    """All links in a folder and its subfolders: what they lead to is read too."""
    found = [Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files)]
    return [path for path in found if path.is_symlink()]


KINDS: dict[str, Callable[..., None]] = {
    "ixi-lesions": _reading_only(lesion_cohort(IXI)),
    "novosibirsk-lesions": _reading_only(lesion_cohort(NOVOSIBIRSK)),
    "glioma": _reading_only(make_glioma),
    "healthy": _reading_only(make_healthy),
    "headct-sprites": _reading_only(make_headct_sprites),
    "oct": _reading_only(make_oct),
    "patients": _reading_only(make_patients),
}
