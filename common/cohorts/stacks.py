"""Single slices as volumes: stacks without anatomy along their third axis."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..files import replacing

STACK = 10  # slices


def write_places(path: Path, places: Mapping[str, Iterable[str]]) -> None:
    """Write which image is which slice of a subject, the record of the split: `places` are names in their order."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["subject", "slice", "name"])
        writer.writerows(
            [subject, place, name] for subject, names in places.items() for place, name in enumerate(names)
        )
