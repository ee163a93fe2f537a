"""Ways to bring intensities to those of the training data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor


@pytest.fixture
def script(load_script):
    return load_script("measure_standardisation")


@pytest.fixture
def brain(load_script):
    return lambda seed: made(load_script("prepared").Brain, seed)


def made(kind, seed):
    rng = np.random.default_rng(seed)
    values = rng.choice([0.35, 0.6, 0.75], p=[0.2, 0.45, 0.35], size=(24, 24, 24)) + rng.normal(0, 0.03, (24, 24, 24))
    image = np.zeros((1, 32, 32, 32), np.float32)
    image[0, 4:28, 4:28, 4:28] = values.clip(0.01, 1)
    lesion = torch.zeros(image.shape, dtype=torch.bool)
    return kind(f"s{seed}", "", "val", MetaTensor(torch.from_numpy(image)), lesion)


def test_equal_histograms(script, brain):
    """Whatever was done to the contrast of an image, as long as the order of its intensities stays."""
    way = script.flat_way([brain(0), brain(1)])
    other = brain(2)
    other.image.copy_(other.image**2.2)
    image, seconds = script.changed(way, other)
    assert seconds > 0
    assert (image[~other.inside] == 0).all()
    levels = np.linspace(0.02, 0.98, 25)
    found, expected = (np.quantile(x[x > 0].numpy(), levels) for x in (image, brain(0).image))
    assert np.abs(found - expected).max() < 0.03


def test_library_units_are_brought_to_those_of_the_training_data(script, brain, monkeypatch):
    """A way that halves and shifts all intensities is undone."""

    class Halves:
        def fit_transform(self, given):
            return Adapter(given.data / 2 + 5)

    class Adapter:
        def __init__(self, data):
            self.data = data

        def get_data(self):
            return self.data

    parts = {"WhiteStripeNormalizer": Halves, "NumpyImageAdapter": Adapter}
    monkeypatch.setattr(script, "optional_import", lambda module, name: (parts[name], True))
    way = script.library_way("whitestripe", [brain(0), brain(1)])
    other = brain(2)
    image, _ = script.changed(way, other)
    assert torch.allclose(image, other.image.as_tensor(), atol=1e-5)
