"""The augmentation by name is MONAI's transforms in a fixed order: the same slices from the same seed."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose

from common.errors import SettingError
from common.transforms.augment import FAINTEST, RandTissueContrastd, slices

FLIP = {"_target_": "RandFlipd", "keys": ["image", "foreground"], "prob": 0.5, "spatial_axis": 0}
AFFINE = {"_target_": "RandAffined", "keys": ["image", "foreground"], "mode": ["bilinear", "nearest"]}
CONTRAST = {"_target_": "RandAdjustContrastd", "keys": "image", "prob": 0.5, "gamma": [0.7, 1.5]}
GAIN = {"_target_": "RandScaleIntensityd", "keys": "image", "prob": 0.5, "factors": 0.1}
FIELD = {"_target_": "RandBiasFieldd", "keys": "image", "prob": 0.5, "coeff_range": [-0.05, 0.05]}
BENT = {"_target_": "RandHistogramShiftd", "keys": "image", "prob": 0.5, "num_control_points": [3, 6]}
SMALL = {"rotate_range": 0.087, "translate_range": 1.0, "scale_range": 0.01}
LARGE = {"prob": 0.8, "rotate_range": 0.1, "scale_range": [0.1, 0.1], "translate_range": 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [FLIP]),
        ({"gamma": [0.7, 1.5], "gain": 0.1}, [FLIP, CONTRAST, GAIN]),
        ({"affine": SMALL}, [FLIP, AFFINE | SMALL | {"prob": 0.5, "padding_mode": "zeros"}]),
        ({"affine": LARGE, "gain": 0.1}, [FLIP, AFFINE | LARGE | {"padding_mode": "zeros"}, GAIN]),
        (
            {"bias_field": 0.05, "gamma": [0.7, 1.5], "control_points": [3, 6], "gain": 0.1},
            [FLIP, FIELD, CONTRAST, BENT, GAIN],
        ),
    ],
)
def test_slices_are_those_of_monais_transforms(settings, expected):
    image = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    item = {"image": image, "foreground": image > 0.3}
    mine = Compose(slices(**settings)).set_random_state(seed=3)
    theirs = Compose(ConfigParser({"a": expected}).get_parsed_content("a")).set_random_state(seed=3)
    changed = 0
    for _ in range(8):
        found, wanted = mine(dict(item)), theirs(dict(item))
        assert torch.equal(torch.as_tensor(found["image"]), torch.as_tensor(wanted["image"]))
        assert torch.equal(torch.as_tensor(found["foreground"]), torch.as_tensor(wanted["foreground"]))
        changed += not torch.equal(torch.as_tensor(found["image"]), image)
    assert changed > 2


def test_probability_is_of_each():
    assert [transform.prob for transform in slices({"prob": 0.8}, 0.1, [0.5, 2], [3, 4], 0.2, prob=0.3)] == [
        *(0.3, 0.8, 0.3, 0.3, 0.3, 0.3)
    ]


MODES = (0.4, 0.6, 0.8)
FLAIR = ((0.0, 0.1), (0.1, 0.3), (0.6, 0.8), (0.5, 0.6), (0.4, 0.7))


def test_tissues_take_values_of_their_ranges():
    transform = RandTissueContrastd("image", MODES, FLAIR).set_random_state(seed=0)
    image = MetaTensor(torch.tensor([[[0.0, 0.4, 0.5, 0.6, 0.8, 1.0]]]))
    drawn = torch.cat([transform({"image": image})["image"].as_tensor() for _ in range(200)]).squeeze(1)
    assert (drawn[:, 0] == 0).all()
    for column, (low, high) in zip((1, 3, 4, 5), FLAIR[1:], strict=True):
        assert low <= drawn[:, column].min() < low + 0.1 * (high - low) + 1e-6
        assert high - 0.1 * (high - low) - 1e-6 < drawn[:, column].max() <= high
    torch.testing.assert_close(drawn[:, 2], (drawn[:, 1] + drawn[:, 3]) / 2)  # between two tissues


def test_brain_stays_brain():
    dark = RandTissueContrastd("image", MODES, [(0.0, 0.0)] * 5)
    image = torch.tensor([[[0.0, 1e-4, 0.5, 1.0]]])
    assert dark({"image": image})["image"].tolist() == [[[0.0, *[pytest.approx(FAINTEST)] * 3]]]


@pytest.mark.parametrize(
    ("modes", "ranges"), [((0.6, 0.4, 0.8), FLAIR), ((0.4, 0.6), FLAIR), (MODES, FLAIR[:4]), (MODES, [(0.5, 0.2)] * 5)]
)
def test_curves_that_are_none_are_refused(modes, ranges):
    with pytest.raises(SettingError):
        RandTissueContrastd("image", modes, ranges)
