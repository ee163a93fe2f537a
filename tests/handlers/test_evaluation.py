"""The image that metrics and baselines look at is the one that the network sees, on the input's grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from monai.data import MetaTensor

from common.handlers.evaluation import BaselineMetrics, labelled_case

AFFINE = np.diag([-2.0, 2.0, 2.0, 1.0])  # not RAS, in which cases are measured


def test_case_is_measured_without_its_bias_field():
    generator = torch.Generator().manual_seed(0)
    prepared = torch.rand(2, 4, 5, 6, generator=generator) * 0.8 + 0.1
    field = torch.rand(2, 4, 5, 6, generator=generator) + 0.5
    units = [10.0, 300.0]
    batch = {
        "subject": "a",
        "image": MetaTensor(prepared, affine=AFFINE, meta={"intensity_unit": units}),
        "bias_field": MetaTensor(field, affine=AFFINE),
        "input": MetaTensor(prepared * field * torch.tensor(units).view(2, 1, 1, 1), affine=AFFINE),
        "brain": MetaTensor(torch.ones(1, 4, 5, 6, dtype=torch.bool), affine=AFFINE),
    }
    case = labelled_case(batch)
    torch.testing.assert_close(case.image, prepared.flip(1))
    torch.testing.assert_close(case.unit, (field * torch.tensor(units).view(2, 1, 1, 1)).flip(1))
    del batch["bias_field"]
    assert labelled_case(batch).unit.flatten().tolist() == units


def test_intensity_of_each_modality_is_a_baseline():
    """A lesion that is bright on the second modality only is found there, and not in the mean of both."""
    lesion = np.zeros((4, 5, 6), dtype=np.uint8)
    lesion[1, 2, 3] = 1
    image = torch.full((2, 4, 5, 6), 0.5)
    image[0, 0], image[1][torch.from_numpy(lesion) > 0] = 1.0, 0.8
    batch = {
        "subject": "a",
        "image": MetaTensor(image, affine=AFFINE, meta={"intensity_unit": [1.0, 1.0]}),
        "input": MetaTensor(image, affine=AFFINE),
        "brain": MetaTensor(torch.ones(1, 4, 5, 6, dtype=torch.bool), affine=AFFINE),
    }
    baselines = BaselineMetrics(["T1", "FLAIR"])
    baselines.update(replace(labelled_case(batch), lesion=torch.from_numpy(lesion).flip(0) > 0))  # RAS
    results = baselines.compute(seed=0)
    assert set(results) == {f"intensity_{d}_{m}" for d in ("bright", "dark") for m in ("T1", "FLAIR")}
    assert results["intensity_bright_FLAIR"]["auprc"]["value"] == 1
    assert all(result["auprc"]["value"] < 0.1 for name, result in results.items() if name != "intensity_bright_FLAIR")
