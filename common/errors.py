"""Everything that can be wrong with an input, one class per kind of problem.

Each message is one line: the file, what is wrong, what to do.
"""

from __future__ import annotations


class UADError(Exception):
    """Base of all errors that a user can act on."""

    def __init__(self, source: object, fact: str, remedy: str) -> None:
        self.source, self.fact, self.remedy = str(source), fact, remedy
        super().__init__(" ".join(f"{source}: {fact}; {remedy}".split()))


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
