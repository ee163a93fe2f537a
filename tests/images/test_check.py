"""One typed error per kind of input that is not a usable scan. The whole way of bad files: tests/bad_inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import ImageFileError, ImageGeometryError, ImageIntensityError, ImageShapeError, UADError
from common.images.check import CheckVolumed, root_cause, source_name


def make_image(shape=(1, 6, 7, 8), affine=None, **meta):
    values = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)
    return MetaTensor(values, affine=np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine, meta=meta)


def check(image, **settings):
    return CheckVolumed("image", **settings)({"image": image})["image"]


def test_good_image_passes_untouched():
    image = make_image()
    assert check(image) is image
    check(make_image((2, 6, 7, 8)), channels=2)


@pytest.mark.parametrize(
    ("shape", "fact"),
    [((1, 6, 7), "2 spatial"), ((1, 6, 7, 8, 2), "4 spatial"), ((2, 6, 7, 8), "2 volumes"), ((1, 6, 7, 1), "slice")],
)
def test_shape(shape, fact):
    with pytest.raises(ImageShapeError, match=fact):
        check(make_image(shape))


@pytest.mark.parametrize(
    "diagonal", [(1, 0, 1), (1, np.nan, 1), (1, 1, np.inf), (1000, 1000, 1000), (1e-3, 1e-3, 1e-3), (1, 1, 25)]
)
def test_geometry(diagonal):
    with pytest.raises(ImageGeometryError):
        check(make_image(affine=np.diag([*diagonal, 1.0])))


def test_a_shear_is_refused_but_not_rounding():
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[0, 2] = 0.02
    check(make_image(affine=affine))
    affine[0, 2] = 0.8
    with pytest.raises(ImageGeometryError, match="sheared"):
        check(make_image(affine=affine))


@pytest.mark.parametrize(("value", "fact"), [(np.nan, "1 voxels"), (np.inf, "1 voxels"), (-np.inf, "1 voxels")])
def test_values_that_are_not_finite(value, fact):
    image = make_image()
    image[0, 1, 2, 3] = value
    with pytest.raises(ImageIntensityError, match=fact):
        check(image)


@pytest.mark.parametrize(("value", "fact"), [(0, "zero"), (7, "are 7")])
def test_constant(value, fact):
    with pytest.raises(ImageIntensityError, match=fact):
        check(make_image() * 0 + value)


def test_messages_are_one_line_with_file_fact_and_remedy():
    image = make_image((1, 6, 7, 1))
    image.meta["filename_or_obj"] = "folder/scan.nii.gz"
    with pytest.raises(UADError) as caught:
        check(image)
    error = caught.value
    assert str(error) == f"folder/scan.nii.gz: {error.fact}; {error.remedy}"
    assert "\n" not in str(error)
    assert source_name(make_image()) == "image"


def test_root_cause_is_found_under_monais_errors():
    error = ImageFileError("scan", "fact", "remedy")
    with pytest.raises(RuntimeError) as caught:
        try:
            raise error
        except ImageFileError as inner:
            raise RuntimeError("applying transform") from inner
    assert root_cause(caught.value) is error
    other = RuntimeError("another")
    assert root_cause(other) is other


LABELS = torch.arange(4096).reshape(16, 16, 16) // 2 % 40  # neighbours along one axis alone are the same
NO_SCANS = {
    "mask": (LABELS > 20).float(),
    "label map": (torch.arange(27).reshape(1, 3, 3, 3) + 1.0)
    .repeat_interleave(6, 1)
    .repeat_interleave(6, 2)
    .repeat_interleave(6, 3)[0],
}


@pytest.mark.parametrize("kind", NO_SCANS)
def test_masks_and_label_maps_are_no_scans(kind):
    with pytest.raises(ImageIntensityError, match=r"a mask or a label map; give the scan itself"):
        check(MetaTensor(NO_SCANS[kind][None].float(), affine=np.eye(4)))


def test_few_grey_values_are_a_scan_where_neighbours_differ():
    greys = torch.randint(0, 60, (1, 12, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    check(MetaTensor(greys, affine=np.eye(4)))
    check(MetaTensor(LABELS[None].float(), affine=np.eye(4)))
