"""What a way of standardising does to tissue beside a lesion."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor


@pytest.mark.parametrize(
    ("way", "shift", "cavity", "before"),
    [(lambda x: x, 0.0, 0.2, 0.6), (lambda x: x / x.mean() / 4, 0.125, 0.125, 0.25)],
)
def test_tissue_beside_the_lesion(load_script, way, shift, cavity, before):
    """A way that does nothing, and one that divides by the mean of the volume."""
    row, brain_of = load_script("measure_standardised_cavities").row, load_script("prepared").Brain
    lesion = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    lesion[0, :2] = True
    images = torch.full((1, 4, 4, 4), 0.6), torch.where(lesion, 0.2, 0.6)
    brains = [brain_of("s", "", "test", MetaTensor(image), torch.zeros_like(lesion)) for image in images]
    found = row(way, *brains, lesion)
    assert found == pytest.approx({"tissue_shift": shift, "cavity": cavity, "tissue_there_before": before}, abs=1e-6)
