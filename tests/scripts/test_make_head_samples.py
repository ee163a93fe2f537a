"""The samples of whole heads, as they are shipped and as the script makes them."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.cohorts.table import SAMPLE_DIR
from common.metrics import auroc, intensity_threshold
from common.metrics.histograms import exact_histograms
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
    labels, _ = ndimage.label(lesion)
    levels = sorted(ndimage.median(image, labels, index=range(1, 5)))
    assert levels[1] < 0.6 * np.median(image[brain])  # infarcts
    assert 1.5 * np.median(image[brain]) < levels[2] < levels[3] < 240  # blood, darker than bone


def test_mr_has_the_contrast_of_each_modality():
    images = {name: values(name).astype(float) for name in ("T1", "FLAIR", "T1CE")}
    tumour = values("mask") > 0
    assert tumour.shape == (128, 128, 20)
    files = [str(path(name)) for name in images]
    data = HeadMRPreprocessing(128, 98.0, 0.8, 3)({"image": files})
    head = data["brain"].as_tensor()[0].numpy()
    assert 0.3 < head[..., 5].mean() < 0.55
    middle = ndimage.binary_erosion(head, np.ones((31, 31, 1))) & ~ndimage.binary_dilation(tumour, np.ones((7, 7, 3)))
    cyst = ndimage.binary_erosion(tumour, np.ones((13, 13, 1)))
    solid = tumour & ~ndimage.binary_erosion(tumour, np.ones((5, 5, 1)))
    brain = {name: np.median(image[middle]) for name, image in images.items()}
    assert np.median(images["T1"][solid]) < 0.9 * brain["T1"]
    assert np.median(images["FLAIR"][solid]) > 1.2 * brain["FLAIR"]
    assert np.percentile(images["T1CE"][solid], 75) > 1.2 * brain["T1CE"]  # its rim
    assert all(np.median(images[name][cyst]) < 0.6 * brain[name] for name in images)
    prepared = data["image"].as_tensor().numpy()
    assert (np.median(prepared[:, middle], axis=1) > 0.3).all()
    assert (np.median(prepared[:, middle], axis=1) < 0.6).all()


@pytest.mark.parametrize("direction", ["bright", "dark"])
@pytest.mark.parametrize(
    ("preprocessing", "names", "mask"),
    [
        (HeadCTPreprocessing(), ["CT"], "CT_mask"),
        (HeadMRPreprocessing(128, 98.0, 0.8, 3), ["T1", "FLAIR", "T1CE"], "mask"),
    ],
    ids=["CT", "MR"],
)
def test_intensity_alone_does_not_find_the_lesions(preprocessing, names, mask, direction):
    """The contract asks every method for more than 0.7 on its sample."""
    data = preprocessing({"image": [str(path(name)) for name in names]})
    image = data["image"].as_tensor()  # the slices have the network's size, and the volume is in RAS
    inside = (image > 0).any(dim=0).numpy()
    anomaly_map = intensity_threshold(image, (image > 0).any(dim=0, keepdim=True), direction)[0].numpy()
    assert auroc(*exact_histograms(anomaly_map[inside], values(mask)[inside] > 0)) < 0.65
