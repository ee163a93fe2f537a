"""The numbers of a case by which bad scans, masks and registrations are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.images.mni import template
from common.results.case import Case
from common.results.quality import QUALITY, noise_share, quality, tissue_contrast
from common.transforms.registration import mni_overlap


def volume(values, affine=None):
    return MetaTensor(torch.from_numpy(values.astype(np.float32))[None], affine=np.eye(4) if affine is None else affine)


def brain_with_noise(std, level=200.0, axes=(0, 1, 2)):
    """A ball that is brighter to one side, with white noise; (image, brain)."""
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, 40)] * 3, indexing="ij"))
    inside = (points**2).sum(axis=0) < 0.9
    image = level * (1 + 0.2 * points[0]) + np.random.default_rng(0).normal(0, std, inside.shape)
    return volume(np.where(inside, image, 0)), volume(inside)


@pytest.mark.parametrize("std", [2.0, 10.0])
def test_noise_is_that_which_was_added(std):
    assert noise_share(*brain_with_noise(std)) == pytest.approx(std / 200, rel=0.05)


def test_noise_has_no_unit_and_edges_count_little():
    image, brain = brain_with_noise(4.0)
    expected = noise_share(image, brain)
    assert noise_share(image * 7, brain) == pytest.approx(expected, rel=1e-4)
    with_lesion = image.clone()
    with_lesion[:, 15:25, 15:25, 15:25] += 150
    assert noise_share(with_lesion, brain) == pytest.approx(expected, rel=0.1)
    assert noise_share(*brain_with_noise(0.0)) < 1e-6


def test_noise_is_seen_along_the_finest_axes():
    """Slices that are 5 mm thick differ by anatomy, not by noise."""
    image, brain = brain_with_noise(4.0)
    stripes = image + 60 * (torch.arange(40) % 2)
    thick = np.diag([1.0, 1.0, 5.0, 1.0])
    assert noise_share(MetaTensor(stripes.as_tensor(), affine=thick), brain) == pytest.approx(4 / 230, rel=0.1)


@pytest.mark.parametrize("inside", [0, 1])
def test_too_little_brain_has_no_noise(inside):
    brain = np.zeros((8, 8, 8))
    brain[4, 4, 4] = inside
    assert noise_share(volume(np.ones((8, 8, 8))), volume(brain)) is None


def test_quality_of_a_case():
    image, brain = template()
    to_mni = np.eye(4)
    maps = dict.fromkeys(("anomaly_map", "reconstruction", "segmentation"), image)
    case = Case("a", image=image, brain=brain, **maps, to_mni=to_mni)
    found = quality(case, {"tissue_modes": [0.2, 0.6, 0.8]})
    assert tuple(found) == QUALITY
    assert found["brain_mask_ml"] == pytest.approx(float(brain.sum()) * 0.008, abs=1e-3)
    assert found["registration_dice"] == 1
    assert found["tissue_contrast"] == 0.25
    assert tissue_contrast([0.2, 0.6, 0.8]) == pytest.approx(0.25)
    assert 0 < found["noise"] < 0.05
    unknown = quality(Case("a", image=image, brain=brain, **maps), {"tissue_modes": None})
    assert (unknown["registration_dice"], unknown["tissue_contrast"]) == (None, None)


def test_overlap_falls_with_the_distance():
    brain = template()[1]
    moved = [
        mni_overlap(brain, np.array([[1, 0, 0, mm], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])) for mm in (0, 6, 20)
    ]
    assert moved[0] == 1 > moved[1] > 0.9 > moved[2] > 0.5
