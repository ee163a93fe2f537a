import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from common.metrics import auto_ddpm_max_dice, global_max_dice, mad_ad_max_dice, masked_bernoulli_metrics
from common.metrics.paper_slices import PaperSlices


def subject(seed, lesion_slices=(), size=24, side=6):
    """A brain in slices 2 to 8 of 11; the map is the squared difference; lesions grow from slice to slice."""
    random = np.random.default_rng(seed)
    foreground = np.zeros((size, size, 11), bool)
    foreground[2:-2, 2:-2, 2:9] = True
    image = random.random((1, size, size, 11)) * foreground
    reconstruction = np.clip(image + 0.05 * random.standard_normal(image.shape), 0, 1) * foreground
    lesion = np.zeros(foreground.shape, bool)
    for more, index in enumerate(lesion_slices):
        lesion[6 : 6 + side, 6 : 6 + side + more, index] = True
    reconstruction[0][lesion] = 0.4
    image[0][lesion] = 0.9
    return {
        "anomaly_map": (image - reconstruction)[0] ** 2,
        "lesion": lesion if lesion.any() else None,
        "foreground": foreground,
        "image": image,
        "reconstruction": reconstruction,
    }


@pytest.fixture(scope="module")
def subjects():
    return [subject(0, (4, 5, 6)), subject(1, (5, 6)), subject(2, (7, 8)), subject(3)]


@pytest.fixture(scope="module")
def found(subjects):
    slices = PaperSlices()
    for one in subjects:
        slices.update(**one, pixel_mm2=4.0)
    return slices.compute()


def taken(subjects, name, chosen):
    """(N, H, W) of the chosen (subject, slice); a healthy subject's lesion is empty."""
    return np.stack(
        [np.zeros((24, 24), bool) if subjects[i][name] is None else subjects[i][name][..., k] for i, k in chosen]
    )


def test_middle_slices_of_the_foreground(subjects, found):
    chosen = [(0, 5), (1, 5), (2, 5), (3, 5)]
    maps, masks = (taken(subjects, name, chosen) for name in ("anomaly_map", "lesion"))
    assert found["mad_ad_s1"] == {"n_slices": 4, "max_dice": pytest.approx(global_max_dice(maps, masks), abs=1e-6)}
    assert found["auto_ddpm"]["n_slices"] == 2
    assert found["auto_ddpm"]["max_dice"] == pytest.approx(auto_ddpm_max_dice(maps[:2], masks[:2]), abs=1e-6)
    assert found["auto_ddpm"]["max_dice_exact"] == pytest.approx(global_max_dice(maps[:2], masks[:2]), abs=1e-6)


def test_groups_by_area(found):
    """6 x 7 and 6 x 6 pixels of 4 mm2: 168 and 144 mm2 are small."""
    groups = {name: found["auto_ddpm"][name]["n_slices"] for name in ("small", "medium", "large")}
    assert groups == {"small": 2, "medium": 0, "large": 0}
    assert found["auto_ddpm"]["large"]["max_dice_exact"] is None
    slices = PaperSlices()
    slices.update(**subject(0, (5,)), pixel_mm2=10.0)
    slices.update(**subject(0, (5,)), pixel_mm2=100.0)
    assert [slices.compute()["auto_ddpm"][name]["n_slices"] for name in ("small", "medium", "large")] == [0, 1, 1]


def test_slice_of_the_largest_lesion_and_thresholds_up_to_the_highest_value(subjects, found):
    chosen = [(0, 6), (1, 6), (2, 8)]
    maps, masks = (taken(subjects, name, chosen) for name in ("anomaly_map", "lesion"))
    expected = mad_ad_max_dice(maps / maps.max(), masks)
    assert found["mad_ad_s2"] == {"n_slices": 3, "max_dice": pytest.approx(expected, abs=1e-6)}


def test_masked_bernoulli_takes_all_slices_with_lesion(subjects, found):
    chosen = [(0, 4), (0, 5), (0, 6), (1, 5), (1, 6), (2, 7), (2, 8)]
    images, reconstructions = (
        np.stack([subjects[i][name][..., k] for i, k in chosen]) for name in ("image", "reconstruction")
    )
    expected = masked_bernoulli_metrics(images, reconstructions, taken(subjects, "lesion", chosen))
    assert found["masked_bernoulli"]["n_slices"] == 7
    for name, numbers in expected.items():
        assert found["masked_bernoulli"][name] == pytest.approx(numbers, abs=1e-5), name


def test_ssim_of_healthy_middle_slices(subjects, found):
    pairs = [(subjects[i]["image"][:, None, ..., 5], subjects[i]["reconstruction"][:, None, ..., 5]) for i in (2, 3)]
    settings = {"gaussian_kernel": False, "kernel_size": 7, "data_range": 1.0}
    expected = [float(structural_similarity_index_measure(*map(torch.from_numpy, p), **settings)) for p in pairs]
    assert found["auto_ddpm"]["healthy_ssim"] == pytest.approx(np.mean(expected), abs=5e-3)
    assert found["auto_ddpm"]["healthy_ssim"] < 0.999


def test_slices_of_other_sizes_are_padded(subjects, found):
    slices = PaperSlices()
    slices.update(**subjects[0], pixel_mm2=4.0)
    slices.update(**{name: v[..., 2:-2, :] for name, v in subjects[1].items()}, pixel_mm2=4.0)
    chosen = [(0, 5), (1, 5)]
    maps, masks = (taken(subjects, name, chosen) for name in ("anomaly_map", "lesion"))
    assert slices.compute()["mad_ad_s1"]["max_dice"] == pytest.approx(global_max_dice(maps, masks), abs=1e-6)


def test_without_a_lesion_all_is_undefined():
    slices = PaperSlices()
    slices.update(**subject(0), pixel_mm2=1.0)
    found = slices.compute()
    assert found["mad_ad_s1"] == {"n_slices": 1, "max_dice": None}
    assert found["mad_ad_s2"] == {"n_slices": 0, "max_dice": None}
    assert found["auto_ddpm"]["auprc"] is None
    assert found["masked_bernoulli"] == {"n_slices": 0, "dice": None, "auprc": None, "psnr": None}


def test_values_outside_the_foreground_are_ignored():
    one = subject(0, (5,))
    other = {**one, "anomaly_map": one["anomaly_map"] + 9 * ~one["foreground"]}
    results = []
    for given in (one, other):
        slices = PaperSlices()
        slices.update(**given, pixel_mm2=4.0)
        results.append(slices.compute())
    assert results[0] == results[1]


def test_subjects_measured_apart_are_as_those_measured_together(subjects, found):
    joined = PaperSlices()
    for one in subjects:
        apart = PaperSlices()
        apart.update(**one, pixel_mm2=4.0)
        joined.merge(apart)
    assert joined.compute() == found
