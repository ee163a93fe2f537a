"""Enhanced DICOM: what its functional groups say of each frame, as a header like that of a classic image."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from typing import Any

from monai.utils import optional_import

pydicom, _ = optional_import("pydicom")

FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


def split_frames(header: Any, keywords: Collection[str]) -> list[Any]:
    """A header for each image of a file: pydicom datasets of `keywords` alone, without nested sequences.

    A classic image is one; of an enhanced one, each frame has what is said of it and of all frames, and of several
    frames its number as InstanceNumber. What cannot be parsed, or is of another type than DICOM says, is left out, as
    if it were not there.
    """
    general = _pick(header, keywords)
    shared, each = (_items(header, keyword) for keyword in FUNCTIONAL_GROUPS)
    for group in shared:
        general.update(_pick_all(group, keywords))
    general.file_meta = header.file_meta
    frames = []
    for number, group in enumerate(each, 1):
        frame = deepcopy(general)
        frame.update(_pick_all(group, keywords))
        if len(each) > 1:
            frame.InstanceNumber = number
        frames.append(frame)
    return frames or [general]


def _items(header: Any, keyword: str) -> list[Any]:
    return list(header.get(keyword) or ())


def _pick_all(dataset: Any, keywords: Collection[str]) -> Any:
    """From a dataset and all that is nested in it."""
    picked = pydicom.Dataset()
    for inner in _walk(dataset):
        picked.update(_pick(inner, keywords))
    return picked


def _walk(dataset: Any) -> Iterator[Any]:
    yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _walk(item)


def _pick(dataset: Any, keywords: Collection[str]) -> Any:
    picked = pydicom.Dataset()
    for keyword in keywords:
        try:
            if keyword in dataset and pydicom.datadict.dictionary_VR(keyword) == dataset[keyword].VR:
                picked.add(dataset[keyword])
        except Exception:  # noqa: S112 - whatever pydicom's converters raise of a malformed value
            continue
    return picked
