"""The table of lesions, the files of images, and what run.json says of a case beside the run itself."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from common.detection.reliability import verdict
from common.results.case import Case, as_nifti, describe, find_lesions, save_nifti

LESIONS = [{"volume_ml": 1.25}, {"volume_ml": 0.5}]


def numbers(share, healthy=None, doubts=()):
    """What `ScoreVolumed` adds."""
    origin = {"kind": "given"} if healthy is None else {"kind": "calibrated", "false_positive_share": healthy}
    return {"threshold": 0.3, "threshold_origin": origin, "abnormal_share": share, **verdict(doubts)}


@pytest.mark.parametrize(
    ("share", "healthy", "warned"),
    [
        (0.099, 0.01, False),
        (0.101, 0.01, True),
        (0.101, 0.02, False),
        (0.201, 0.02, True),
        (0.021, 0.002, True),
        (0.099, None, False),  # of a threshold that is given 1 % is taken for the healthy share
        (0.101, None, True),
    ],
)
def test_ten_times_the_healthy_share_is_warned_of(share, healthy, warned):
    warnings = describe(numbers(share, healthy), LESIONS)["warnings"]
    assert len(warnings) == warned
    assert all(f"{share:.0%} of the brain is above the threshold, more than 10 times" in text for text in warnings)


def test_doubts_are_warnings_too():
    found = describe(numbers(0.5, 0.01, ["slices of 5.0 mm", "another contrast"]), LESIONS)
    assert found["warnings"][:2] == [
        "unreliable, do not interpret: slices of 5.0 mm",
        "unreliable, do not interpret: another contrast",
    ]
    assert len(found["warnings"]) == 3
    assert (found["reliability"], found["doubts"]) == ("unreliable", ["slices of 5.0 mm", "another contrast"])
    assert (found["lesions"], found["lesion_volume_ml"]) == (2, 1.75)


AFFINE = np.array([[-1.5, 0.1, 0, 40], [0.2, 0, 2.0, -30], [0, 1.8, 0, 10], [0, 0, 0, 1]])


def found(share):
    """A case whose map is blobs, of which `share` of the voxels are segmented."""
    generator = np.random.default_rng(2)
    values = ndimage.gaussian_filter(generator.normal(size=(30, 26, 20)), 1.5).astype(np.float32)
    mask = values > np.quantile(values, 1 - share)
    volume, segmentation = (MetaTensor(torch.from_numpy(x)[None], affine=AFFINE) for x in (values, mask))
    return Case("a", volume, segmentation, volume, volume, segmentation)


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5, 1.0])
def test_lesions_are_those_that_scipy_measures(share):
    """Number by number, by one pass through the volume for each measure."""
    case = found(share)
    mask, values = case.segmentation[0].numpy(), case.anomaly_map[0].numpy()
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    index = np.arange(1, count + 1)
    volumes = ndimage.sum_labels(mask, labels, index) * abs(np.linalg.det(AFFINE[:3, :3])) / 1000
    world = nib.affines.apply_affine(AFFINE, np.array(ndimage.center_of_mass(mask, labels, index)))
    means, maxima = ndimage.mean(values, labels, index), ndimage.maximum(values, labels, index)
    measures = np.column_stack([volumes, world, means, maxima])[np.argsort(-volumes, kind="stable")].tolist()
    digits = (4, 2, 2, 2, 6, 6)
    expected = [[round(value, n) for value, n in zip(row, digits, strict=True)] for row in measures]
    lesions = find_lesions(case)
    assert [[*lesion.values()] for lesion in lesions] == expected
    assert list(lesions[0]) == ["volume_ml", "x_mm", "y_mm", "z_mm", "mean_map", "max_map"]
    assert (count > 1) == (share < 1)


def test_nothing_found_is_an_empty_table():
    assert find_lesions(found(0.0)) == []


def test_image_file_holds_what_nibabel_would_write(tmp_path):
    volume = found(0.1).anomaly_map
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        save_nifti(volume, AFFINE, tmp_path / name)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert gzip.decompress(content) == (tmp_path / "c.nii").read_bytes() == as_nifti(volume, AFFINE).to_bytes()
    assert np.array_equal(nib.load(tmp_path / "a.nii.gz").get_fdata(), volume[0].numpy())
