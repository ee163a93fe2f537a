"""Scanner units to [0, 1] and the unit that brings them back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import ImageIntensityError
from common.transforms.intensity import FOREGROUND_FLOOR, ScaleIntensityByForegroundd


def make_data(channels=1):
    values = torch.rand(channels, 12, 12, 12, generator=torch.Generator().manual_seed(0)) * 900 + 100
    foreground = torch.zeros(1, 12, 12, 12, dtype=torch.bool)
    foreground[:, 2:10, 2:10, 2:10] = True
    return {"image": MetaTensor(values), "foreground": MetaTensor(foreground)}


def scale(data, **settings):
    return ScaleIntensityByForegroundd("image", "foreground", **settings)(data)["image"]


def test_percentile_of_the_foreground_becomes_upper():
    data = make_data()
    inside = data["foreground"].as_tensor()
    image = scale(data, percentile=98.0, upper=0.8).as_tensor()
    assert np.percentile(image[inside], 98) == pytest.approx(0.8, abs=1e-5)
    assert not image[~inside].any()  # the background was anything but 0
    assert image.dtype == torch.float32


def test_unit_brings_the_values_back():
    data = make_data()
    inside = data["foreground"].as_tensor()
    image = scale(data, percentile=99.0, upper=0.5)
    torch.testing.assert_close(
        image.as_tensor()[inside] * image.meta["intensity_unit"][0], data["image"].as_tensor()[inside]
    )


def test_values_are_clipped_to_floor_and_one():
    data = make_data()
    data["image"][0, 2:4] = -50.0
    data["image"][0, 9, 9, 9] = 1e6
    image = scale(data).as_tensor()
    assert float(image.max()) == 1
    assert float(image[data["foreground"].as_tensor()].min()) == pytest.approx(FOREGROUND_FLOOR)


def test_each_channel_by_itself():
    data = make_data(channels=2)
    image = scale(data)
    brighter = {**data, "image": data["image"] * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)}
    scaled = scale(brighter)
    torch.testing.assert_close(scaled.as_tensor(), image.as_tensor(), rtol=1e-5, atol=1e-6)
    units = scaled.meta["intensity_unit"]
    assert units[1] == pytest.approx(30 * image.meta["intensity_unit"][1])


def test_foreground_without_tissue_is_refused():
    data = make_data()
    data["image"] = data["image"] * 0 - 1
    with pytest.raises(ImageIntensityError, match="98th percentile"):
        scale(data)
