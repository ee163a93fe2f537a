"""Scanner units to [0, 1] and the unit that brings them back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import ImageIntensityError
from common.transforms.intensity import FOREGROUND_FLOOR, CorrectBiasFieldd, ScaleIntensityByForegroundd


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


def three_tissues(shape=(48, 48, 40)):
    """A ball of three shells of tissue in a slow field of 0.8 to 1.25, 4 mm; the ball, and the field."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in shape), indexing="ij")
    radius = sum(x**2 for x in axes).sqrt()
    tissue = 300.0 + 200.0 * (radius * 7).floor().remainder(3)
    field = torch.exp(0.22 * axes[0] * (1 - axes[1] ** 2))
    affine = torch.diag(torch.tensor([4.0, 4.0, 4.0, 1.0]))
    foreground = (radius < 0.9)[None]
    image = MetaTensor((tissue * field)[None] * foreground, affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    return {"image": image, "foreground": MetaTensor(foreground, affine=affine)}, field[None]


@pytest.mark.parametrize("shape", [(48, 48, 40), (48, 48, 1)])
def test_bias_field_is_found(shape):
    data, field = three_tissues(shape)
    inside = data["foreground"].as_tensor()
    result = CorrectBiasFieldd("image", "foreground")(data)
    found = result["bias_field"].as_tensor()
    assert found.shape == data["image"].shape
    assert found.dtype == torch.float32
    left = (found / field).log()[inside].std()
    assert left < 0.35 * field.log()[inside].std()
    torch.testing.assert_close((result["image"] * found).as_tensor(), data["image"].as_tensor())
    assert result["image"].meta["filename_or_obj"] == "a.nii.gz"  # errors that follow name the file
    again = CorrectBiasFieldd("image", "foreground")(data)
    assert torch.equal(again["bias_field"].as_tensor(), found)


def test_field_of_each_channel_by_itself():
    data, _ = three_tissues()
    flat = data["image"].clone()
    flat[:] = 5.0 * data["foreground"].as_tensor()
    both = {**data, "image": torch.cat([data["image"], flat])}
    fields = CorrectBiasFieldd("image", "foreground")(both)["bias_field"].as_tensor()
    alone = CorrectBiasFieldd("image", "foreground")(data)["bias_field"].as_tensor()
    assert torch.equal(fields[:1], alone)
    inside = data["foreground"].as_tensor()[0]
    assert (fields[1][inside] - 1).abs().max() < 0.03
