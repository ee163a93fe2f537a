"""The brain within a head: by the template, by a program that may be missing or fail, and who says so."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from scipy.spatial.transform import Rotation

from common.cohorts.table import SAMPLE_DIR
from common.errors import SkullStripError
from common.transforms.brain import BrainMaskd
from common.transforms.strip import atlas_brain_mask

HD_BET = """\
#!{python}
import sys
import nibabel as nib
import numpy as np

args = sys.argv[1:]
assert "--save_bet_mask" in args and "--no_bet_image" in args and args[args.index("-device") + 1] in ("cpu", "cuda")
head, out = nib.load(args[args.index("-i") + 1]), args[args.index("-o") + 1]
assert out.endswith(".nii.gz")
if {fails}:
    sys.exit("no weights")
mask = (np.asarray(head.dataobj) > 150).astype(np.uint8)
nib.save(nib.Nifti1Image(mask, head.affine), out[:-7] + "_bet.nii.gz")
"""


@pytest.fixture(scope="module")
def head():
    """The sample with CSF, skull, scalp, a neck and noise around it, smaller than the template and tilted."""
    file = nib.load(SAMPLE_DIR / "mni152_lesions_T1.nii.gz")
    volume = np.pad(file.get_fdata(dtype=np.float32), ((12, 12), (12, 12), (40, 12)))
    brain = volume > 0
    away = ndimage.distance_transform_edt(~brain, sampling=2)
    neck = np.hypot(*(np.indices(volume.shape)[:2] - np.array([50, 50])[:, None, None, None])) < 28
    neck &= np.arange(volume.shape[2]) < 46
    volume[(away > 0) & (away <= 4)] = 40
    volume[(away > 4) & (away <= 9)] = 8
    volume[(away > 9) & (away <= 16)] = 230
    volume[neck & (away > 9)] = 150
    volume += np.random.default_rng(0).uniform(0, 5, volume.shape).astype(np.float32)
    tilt = Rotation.from_euler("xyz", [12, 5, -8], degrees=True).as_matrix() * 0.9
    affine = nib.affines.from_matvec(tilt, [7, -5, 11]) @ file.affine
    affine[:3, 3] -= affine[:3, :3] @ (12, 12, 40)
    return volume, brain, affine


def make_image(volume, affine):
    return MetaTensor(torch.as_tensor(volume, dtype=torch.float32)[None], affine=affine)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize(("contrast", "overlap"), [("T1", 0.95), ("T2", 0.9)])  # in T2 the CSF is as bright as tissue
def test_atlas_finds_the_brain_of_a_head(contrast, overlap, head):
    volume, brain, affine = head
    if contrast == "T2":
        volume = np.interp(volume, [0, 8, 40, 140, 220, 300], [0, 10, 250, 140, 90, 90])
    image = make_image(volume, affine)
    mask = atlas_brain_mask(image)
    assert mask.shape == image.shape
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.affine, image.affine)
    assert dice(mask[0].numpy(), brain) > overlap


def test_source_of_the_brain_is_told(head):
    volume, brain, affine = head
    image = make_image(volume, affine)
    found = BrainMaskd("image", strip="atlas")({"image": image})
    assert found["brain_source"] == "atlas (approximate)"
    assert not found["image"].as_tensor()[~found["brain"].as_tensor()].any()
    inside = found["brain"].as_tensor()
    assert torch.equal(found["image"].as_tensor()[inside], image.as_tensor()[inside])
    stripped = make_image(volume * brain, affine)
    for strip in (None, "atlas", "deepbet", "hd-bet"):
        result = BrainMaskd("image", strip=strip)({"image": stripped})
        assert result["brain_source"] == "stripped"
        assert np.array_equal(result["brain"][0], ndimage.binary_fill_holes(brain))
        result = BrainMaskd("image", strip=strip)({"image": image, "brain": make_image(brain, affine)})
        assert result["brain_source"] == "given"
        assert np.array_equal(result["brain"][0], brain)


def test_head_is_refused_with_the_ways_out(head):
    volume, _, affine = head
    with pytest.raises(SkullStripError, match=r"::strip atlas.*::brain MASK"):
        BrainMaskd("image")({"image": make_image(volume, affine)})


def test_atlas_refuses_what_is_no_head():
    noise = np.random.default_rng(0).uniform(0, 100, (90, 90, 90))
    with pytest.raises(SkullStripError, match="does not fit"):
        atlas_brain_mask(make_image(noise, np.diag([2.0, 2.0, 2.0, 1])))


def test_unknown_way_to_strip_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="atlas, deepbet, hd-bet or None"):
        BrainMaskd("image", strip="fsl")


def install_hd_bet(folder, monkeypatch, fails=False):
    program = folder / "hd-bet"
    program.write_text(HD_BET.format(python=sys.executable, fails=fails))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_hd_bet_is_called_where_it_is_installed(head, tmp_path, monkeypatch):
    volume, _, affine = head
    install_hd_bet(tmp_path, monkeypatch)
    result = BrainMaskd("image", strip="hd-bet")({"image": make_image(volume, affine)})
    assert result["brain_source"] == "hd-bet"
    assert np.array_equal(result["brain"][0], volume > 150)


def test_hd_bet_that_fails_says_why(head, tmp_path, monkeypatch):
    volume, _, affine = head
    install_hd_bet(tmp_path, monkeypatch, fails=True)
    with pytest.raises(SkullStripError, match="no weights"):
        BrainMaskd("image", strip="hd-bet")({"image": make_image(volume, affine)})


def test_hd_bet_that_is_missing_is_told_how_to_get(head, tmp_path, monkeypatch):
    volume, _, affine = head
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SkullStripError, match="pip install hd-bet"):
        BrainMaskd("image", strip="hd-bet")({"image": make_image(volume, affine)})
