"""Boxes and registration compared: the boxes are those of the product, and the registration sees what boxes cannot."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.detection.normalisation import WithinSubjectNormalisation, minus_mirrored, robust_z
from common.transforms.registration import template


@pytest.fixture
def script(load_script):
    return load_script("measure_alignment")


@pytest.fixture
def case_of(script, load_script):
    """A case of random values in the template's brain, whose world is turned by some degrees about the axis of z."""
    prepared = load_script("prepared")

    def case(subject, split, seed, degrees=0.0):
        image = template()[0]
        inside = image[0].numpy() > 0
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(a := np.deg2rad(degrees)), -np.sin(a)], [np.sin(a), np.cos(a)]]
        values = np.random.default_rng(seed).gamma(2.0, size=inside.shape).astype(np.float32) * inside
        brain = prepared.Brain(subject, "", split, image, torch.zeros(image.shape, dtype=torch.bool))
        return script.Case(brain, robust_z(values, inside)[0], inside, turn @ np.asarray(image.affine), 0.0), values

    return case


def test_boxes_are_the_product(script, case_of, monkeypatch):
    cases = [case_of(f"h{i}", "val", i) for i in range(12)] + [case_of("t", "test", 99)]
    maps = {}
    monkeypatch.setattr(
        script, "evaluated", lambda pairs, threshold: maps.update(threshold=threshold, pairs=list(pairs))
    )
    normalisation = WithinSubjectNormalisation()
    script.measure([case for case, _ in cases], normalisation, script.BOX, script.BOX)
    *healthy, (tested, values) = cases
    inside = torch.from_numpy(tested.inside)[None]
    fitted = normalisation.fit([normalisation.healthy_map(torch.from_numpy(v)[None], inside) for _, v in healthy])
    expected, _ = normalisation(torch.from_numpy(values)[None], inside)
    ((_, found),) = maps["pairs"]
    assert torch.allclose(found, expected, atol=2e-3)  # an atlas is kept in half precision
    assert maps["threshold"] == pytest.approx(np.quantile(np.concatenate(fitted), 1 - script.SHARE), abs=2e-3)


def test_a_turned_brain_has_its_mirror_plane(script, case_of):
    """Two spots at mirrored places of MNI152, in a volume that is turned against it."""
    case, _ = case_of("t", "test", 0, degrees=12.0)
    to_voxel = np.linalg.inv(case.to_mni)
    values = np.zeros_like(case.z)
    left, right = (tuple(np.rint(nib.affines.apply_affine(to_voxel, [x, -50.0, 20.0])).astype(int)) for x in (-40, 40))
    for place in (left, right):
        values[tuple(slice(i - 1, i + 2) for i in place)] = 10.0
    assert script.minus_mirrored_in_mni(values, case, 1.0)[left] < 5.0
    assert minus_mirrored(values, case.inside, 1.0)[left] == pytest.approx(10.0)


def test_an_affine_atlas_comes_back(script, case_of):
    case, _ = case_of("t", "test", 0, degrees=12.0)
    smooth = np.fromfunction(lambda x, y, z: (x + y) / 50, case.z.shape, dtype=np.float32) * case.inside
    case.z = smooth.astype(np.float32)
    total, count = script.to_common(case, script.AFFINE)
    back = script.from_common(script.mean_of(total, count), case, script.AFFINE)
    depth = torch.from_numpy(case.inside)
    inner = -torch.nn.functional.max_pool3d(-depth[None, None].float(), 9, 1, 4)[0, 0].numpy() > 0
    assert np.abs(back - smooth)[inner].max() < 0.05
    assert isinstance(case.brain.image, MetaTensor)


def test_masks_alone_are_registered(script):
    """Intensities that would lead the registration astray do not count."""
    image, mask = template()
    brain = MetaTensor(mask.as_tensor() > 0, affine=image.affine)
    flat = MetaTensor(torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) * brain, affine=image.affine)
    by_masks = [script.masks_transform(x, brain) for x in (image, flat)]
    assert np.array_equal(*by_masks)
    points = nib.affines.apply_affine(by_masks[0], np.array([[-40.0, -20, 10], [40, 20, 30]]))
    assert np.abs(points - [[-40, -20, 10], [40, 20, 30]]).max() < 2.0
