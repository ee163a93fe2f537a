"""Everything that can be wrong with an input, one class per kind of problem.

Each message is one line: the file, what is wrong, what to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# how `monai.bundle run` takes a setting: by the item of a config
ITEMS = {
    "strip": "give --preprocessing::strip {}",
    "brain_mask": "give --dataset::data::brain {}",
    "series": "give --dataset::data::series {}",
    "bundle_root": "give --bundle_root {}",
    "items": "give --{}",
}
_WORDS: ContextVar[Mapping[str, str]] = ContextVar("words", default=ITEMS)


@contextmanager
def settings_said_as(words: Mapping[str, str]) -> Iterator[None]:
    """How the reader of an error gives a setting here, by its name; one without words is not advised.

    words: text of each setting, "{}" in it stands for the value.
    """
    before = _WORDS.set(words)
    try:
        yield
    finally:
        _WORDS.reset(before)


def settings_words() -> dict[str, str]:
    """The words of `settings_said_as` that are in use, for another thread or process."""
    return dict(_WORDS.get())


class UADError(Exception):
    """Base of all errors that a user can act on.

    Args:
        source: the file, or what else it is about.
        fact: what is wrong.
        advice: what helps however a bundle is run: it names no option.
        settings: what helps too, where it can be set: the value by the setting's name, see `settings_said_as`.
            `items` is any item of a config, ITEM=VALUE.
    """

    def __init__(self, source: object, fact: str, advice: str, **settings: str) -> None:
        super().__init__(source, fact, advice)
        self.source, self.fact, self.advice, self.settings = str(source), fact, advice, settings

    @property
    def remedy(self) -> str:
        """What the reader can do here."""
        return self.remedy_in(_WORDS.get())

    def remedy_in(self, words: Mapping[str, str]) -> str:
        """What a reader can do who gives settings in these words."""
        said = (words[name].format(value).strip() for name, value in self.settings.items() if name in words)
        return ", or ".join([self.advice, *said])

    def __str__(self) -> str:
        return " ".join(f"{self.source}: {self.fact}; {self.remedy}".split())


def one_line(command: Callable[P, R]) -> Callable[P, R]:
    """`command`, which ends the process with one line instead of a traceback where an input is to blame."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except UADError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from None

    return wrapped


def first_few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class ImageFileError(UADError):
    """The file is missing, unreadable, truncated or not an image."""


class ImageShapeError(UADError):
    """Wrong number of dimensions, slices or channels."""


class ImageGeometryError(UADError):
    """The affine does not place the voxels in millimetres: singular, missing, not finite or implausible."""


class ImageIntensityError(UADError):
    """Voxel values that cannot be an image: NaN, Inf, all zero, constant."""


class SkullStripError(UADError):
    """The image does not look skull-stripped, or the brain mask does not fit it."""


class RegistrationError(UADError):
    """The image could not be brought to the MNI152 template, or modalities not to each other."""


class DicomError(UADError):
    """The folder holds no DICOM series that is one volume: none, several, incomplete, or another kind of object."""


class OutputError(UADError):
    """The results cannot be written where they should."""


class ResultError(UADError):
    """The folder holds no results that a report can show, or broken ones."""


class CohortError(UADError):
    """The cohort CSV does not say what is needed."""


class SettingError(UADError, ValueError):
    """A number or a choice that a method cannot work with, or that does not fit another."""


class BundleError(UADError):
    """The bundle, its weights or its calibration cannot be used."""


class ClusterError(UADError):
    """The cluster that was to do the cases cannot be reached, or was lost."""
