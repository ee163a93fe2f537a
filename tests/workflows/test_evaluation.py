"""The image that metrics and baselines look at is the one that the network sees, on the input's grid."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from common.metrics.baselines import QUANTITIES
from common.workflows.evaluation import BaselineMetrics, fit_healthy_baselines, labelled_case

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


def test_baselines_of_the_prepared_image_are_measured_on_the_inputs_grid():
    """The network's grid is coarser, of another direction and padded; the dark ball is found where the label has it."""
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    grid = np.moveaxis(np.indices((60, 64, 56)), 0, -1)
    brain = torch.from_numpy(np.linalg.norm((grid - [30, 32, 28]) / [26, 28, 24], axis=-1) <= 1)[None]
    ball = torch.from_numpy(np.linalg.norm(grid - [20, 36, 30], axis=-1) <= 6)

    def batch(subject, lesion):
        values = torch.where(brain, 0.7, 0.0)
        values[0][ball & brain[0]] = 0.2 if lesion else 0.7
        prepared = values.flip(1)[:, ::2, ::2, ::2]
        start = nib.affines.apply_affine(affine, (59, 0, 0))
        of_prepared = nib.affines.from_matvec(np.diag([2.0, 2.0, 2.0]), start)
        padded = torch.nn.functional.pad(prepared, (0, 0, 3, 4, 2, 5))
        of_prepared[:3, 3] -= [4, 6, 0]
        return {
            "subject": subject,
            "site": "elsewhere",
            "image": MetaTensor(padded, affine=of_prepared, meta={"intensity_unit": [1.0]}),
            "input": MetaTensor(values, affine=affine),
            "brain": MetaTensor(brain, affine=affine),
        }

    healthy = fit_healthy_baselines([batch(name, False) for name in "ab"], lambda item: item)
    baselines = BaselineMetrics(["T1"], healthy)
    baselines.update(replace(labelled_case(batch("c", True)), lesion=(ball & brain[0]).flip(0)))
    baselines.update(labelled_case(batch("d", False)))
    results = baselines.compute(seed=0)
    assert set(QUANTITIES) | {"mean_healthy_image"} < set(results)
    for name in ("darkness_minus_atlas", "mirrored_minus_atlas"):
        assert results[name]["auprc"]["value"] > 0.9, name
        assert results[name]["volume_auroc"]["value"] == 1
    assert results["brightness_minus_atlas"]["auprc"]["value"] < 0.2
    assert [site["site"] for site in results["darkness_minus_atlas"]["sites"]] == ["elsewhere"]
    assert fit_healthy_baselines([], lambda item: item) is None
