"""Slices of a labelled cohort: which are loaded, which are drawn, and what is measured on them."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.cohorts.table import write_cohort
from common.workflows.drawn_slices import Slices, drawn, load_slices, pooled

SHAPE = (6, 8, 4)  # at 1 mm


def prepared(item):
    """The image as it is stored, which is its own brain."""
    image = nib.load(item["image"])
    data = MetaTensor(torch.from_numpy(image.get_fdata(dtype=np.float32))[None], affine=torch.from_numpy(image.affine))
    return {"image": data, "brain": data > 0}


def write(path, values):
    nib.save(nib.Nifti1Image(np.asarray(values, dtype=np.float32), np.eye(4)), path)
    return path.name


@pytest.fixture
def cohort(tmp_path):
    """`a` with a lesion in slice 2 and nothing at all in slice 0, its tumour-free slices, and `b`, which is healthy."""
    image, lesion = np.full(SHAPE, 0.5), np.zeros(SHAPE)
    image[..., 0], lesion[1:3, 2:5, 2] = 0, 1
    a, b = write(tmp_path / "a.nii.gz", image), write(tmp_path / "b.nii.gz", np.full(SHAPE, 0.5))
    row = {"split": "test", "brain": "", "lesion": ""}
    mask = write(tmp_path / "lesion.nii.gz", lesion)
    rows = [{"subject": "a", "T1": a, **row, "lesion": mask}, {"subject": "a_healthy", "T1": a, **row}]
    write_cohort(tmp_path / "cohort.csv", ["T1"], [*rows, {"subject": "b", "T1": b, **row}])
    return tmp_path / "cohort.csv"


def test_slices_with_foreground_of_each_subject_once(cohort):
    slices = load_slices(cohort, ["T1"], "test", prepared, seed=3)
    assert slices.subject == ["a"] * 3 + ["b"] * 4
    assert slices.image.shape == (7, 1, 6, 8)
    assert slices.diseased.tolist() == [False, True, False, False, False, False, False]
    assert slices.lesion[1].nonzero().tolist() == [[row, column] for row in (1, 2) for column in (2, 3, 4)]
    assert slices.seed.tolist() == [3 * 1_000_003 + index for index in (1, 2, 3, 0, 1, 2, 3)]
    some = slices.take(torch.tensor([1, 4]))
    assert (some.subject, some.diseased.tolist()) == (["a", "b"], [True, False])


@pytest.mark.parametrize(
    ("sick", "well", "count", "expected"), [(9, 9, 8, 4), (2, 9, 8, 2), (9, 2, 8, 6), (1, 1, 8, 1)]
)
def test_half_of_what_is_drawn_is_diseased_where_there_are_as_many(sick, well, count, expected):
    diseased = np.array([True] * sick + [False] * well)
    indices = drawn(diseased, count, seed=0)
    assert len(indices) == min(count, sick + well) == len(indices.unique())
    assert diseased[indices].sum() == expected
    assert torch.equal(indices, drawn(diseased, count, seed=0))
    assert indices.tolist() == sorted(indices.tolist())


def test_measured_over_the_foreground_by_subject():
    image = torch.full((4, 1, 6, 8), 0.5)
    image[..., 0] = 0  # outside, where the map is highest
    lesion = torch.zeros(4, 6, 8, dtype=torch.bool)
    lesion[::2, 2:4, 2:4] = True
    maps = lesion.float() + 0.1
    maps[..., 0] = 9
    slices = Slices(image, lesion, ["a", "a", "b", "b"], torch.arange(4))
    found = pooled(slices, maps, seed=0, scores=torch.tensor([2.0, 3.0, 2.0, 1.0]), reconstruction=image)
    assert found["auprc"]["value"] == 1
    assert found["image_auroc"]["value"] == 1
    assert found["image_auroc_method"]["value"] == 0.5  # ranks one healthy slice above those with a lesion
    assert found["ssim"]["value"] == pytest.approx(1)
    assert "ssim" not in pooled(slices, maps, seed=0) or pooled(slices, maps, seed=0)["ssim"]["value"] is None
