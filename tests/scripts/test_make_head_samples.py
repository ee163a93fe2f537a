"""The samples of whole heads, as they are shipped and as the script makes them."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.data.cohort import SAMPLE_DIR
from common.transforms.head import HeadCTPreprocessing, HeadMRPreprocessing

NAMES = ("CT", "CT_mask", "T1", "FLAIR", "T1CE", "mask")


def path(name, folder=SAMPLE_DIR):
    return folder / f"head_lesions_{name}.nii.gz"


def values(name, folder=SAMPLE_DIR):
    return np.asarray(nib.load(path(name, folder)).dataobj)


def test_script_makes_the_shipped_samples(load_script, tmp_path):
    pytest.importorskip("nilearn", reason="the template comes with nilearn (requirements-dev.txt)")
    load_script("make_head_samples").make_head_samples(tmp_path)
    for name in NAMES:
        np.testing.assert_array_equal(nib.load(path(name, tmp_path)).affine, nib.load(path(name)).affine)
        made, kept = (values(name, folder).astype(int) for folder in (tmp_path, SAMPLE_DIR))
        # other versions of numpy and scipy may round a few voxels to the neighbouring integer
        np.testing.assert_allclose(made, kept, atol=1, rtol=0)
        assert np.mean(made != kept) < 1e-4


def test_files_are_small():
    assert all(path(name).stat().st_size < 150_000 for name in NAMES)


def test_ct_is_windowed_as_the_data_are():
    image, lesion = values("CT"), values("CT_mask") > 0
    assert image.shape == lesion.shape == (64, 64, 20)
    assert image.dtype == np.uint8
    assert (image[:4, :4] == 25).all()
    data = HeadCTPreprocessing()({"image": str(path("CT"))})
    head = data["brain"].as_tensor()[0].numpy()
    assert 1400 < head[..., :10].sum(axis=(0, 1)).min() < head.sum(axis=(0, 1)).max() < 1800
    assert 0.1 < (image[head] == 255).mean() < 0.35  # bone
    brain = ndimage.binary_erosion(head, np.ones((15, 15, 1))) & ~lesion
    assert 105 < np.median(image[brain]) < 130
    assert lesion[head].sum() == lesion.sum()
    assert ndimage.label(lesion)[1] == 4
    assert 160 < np.percentile(image[lesion], 10) < np.percentile(image[lesion], 90) < 230  # blood, darker than bone


def test_mr_has_the_contrast_of_each_modality():
    images = {name: values(name).astype(float) for name in ("T1", "FLAIR", "T1CE")}
    tumour = values("mask") > 0
    assert tumour.shape == (128, 128, 20)
    files = [str(path(name)) for name in images]
    data = HeadMRPreprocessing(128, 98.0, 0.8, 3)({"image": files})
    head = data["brain"].as_tensor()[0].numpy()
    assert 0.3 < head[..., 5].mean() < 0.55
    middle = ndimage.binary_erosion(head, np.ones((31, 31, 1))) & ~ndimage.binary_dilation(tumour, np.ones((7, 7, 3)))
    core = ndimage.binary_erosion(tumour, np.ones((13, 13, 1)))
    rim = tumour & ~ndimage.binary_erosion(tumour, np.ones((7, 7, 1)))
    brain = {name: np.median(image[middle]) for name, image in images.items()}
    assert np.median(images["T1"][core]) < 0.7 * brain["T1"]
    assert np.median(images["FLAIR"][core]) > 1.5 * brain["FLAIR"]
    assert np.median(images["T1CE"][core]) < 0.7 * brain["T1CE"]
    assert np.percentile(images["T1CE"][rim], 75) > 1.2 * brain["T1CE"]
    prepared = data["image"].as_tensor().numpy()
    assert (np.median(prepared[:, middle], axis=1) > 0.3).all()
    assert (np.median(prepared[:, middle], axis=1) < 0.6).all()
