"""The image that metrics and baselines look at is the one that the network sees, on the input's grid."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate

from common.detection.method import AnomalyDetector
from common.detection.volume import VolumeDetector
from common.metrics.baselines import QUANTITIES
from common.transforms.pipeline import BrainPreprocessing
from common.weights import save_weights
from common.workflows.engines import DetectionEvaluator
from common.workflows.evaluation import BaselineMetrics, Evaluate, fit_healthy_baselines, labelled_case, on_slices_of

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


def stack(prepared, brain, prepared_affine=AFFINE):
    """A case of these tensors, each on its own grid."""
    return labelled_case(
        {
            "subject": "a",
            "image": MetaTensor(prepared, affine=prepared_affine, meta={"intensity_unit": [1.0]}),
            "input": MetaTensor(torch.ones(brain.shape), affine=AFFINE),
            "brain": MetaTensor(brain, affine=AFFINE),
        }
    )


def test_scores_of_slices_on_the_same_grid_stay():
    brain = torch.ones(1, 4, 5, 6, dtype=torch.bool)
    brain[..., 2] = False
    scores = torch.tensor([3.0, -1.0, torch.nan, 0.5, 100.0, 7.0])
    found = on_slices_of(stack(torch.ones(1, 4, 5, 6), brain), scores, axis=2)
    assert found.shape == (6,)
    np.testing.assert_allclose(found[[0, 1, 3, 4, 5]], [3, -1, 0.5, 100, 7], rtol=1e-5)


def test_scores_of_slices_of_another_grid():
    """The network's slices are twice as thick and begin one further; beyond them the next one's score holds."""
    brain = torch.ones(1, 8, 8, 12, dtype=torch.bool)
    affine = AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = AFFINE[:3, :3] @ (-3.0, 0.5, 2.5)  # its first columns lie outside of the brain
    case = stack(torch.ones(1, 6, 4, 4), brain, affine)
    found = on_slices_of(case, torch.tensor([10.0, 20.0, 30.0, torch.nan]), axis=2)
    # the centres of its slices lie at 2.5, 4.5, 6.5 and 8.5
    np.testing.assert_allclose(found[3:7], [12.5, 17.5, 22.5, 27.5], rtol=1e-5)
    np.testing.assert_allclose(found[:3], 10, rtol=1e-5)
    np.testing.assert_allclose(found[7:], 30, rtol=1e-5)


class Costly(AnomalyDetector):
    """A map that says nothing; the score, which takes a pass of its own, is the dark share of the slice."""

    def _detect(self, image, foreground, generators):
        return torch.ones_like(image), image * 0.9

    def score(self, image, foreground, generators):
        return ((image < 0.4) & foreground).flatten(1).float().mean(dim=1)


@pytest.mark.parametrize("free", [True, False])
def test_score_of_the_method_is_measured_beside_that_of_the_map(free, save_nifti, tmp_path):
    """Every slice with a lesion has a darker square; whether the score comes with the map or not."""

    class Free(Costly):
        score = AnomalyDetector.score

        def _detect(self, image, foreground, generators):
            return *super()._detect(image, foreground, generators), Costly.score(self, image, foreground, generators)

    network = VolumeDetector(Free() if free else Costly())
    weights = tmp_path / "weights.pt"
    save_weights(network.state_dict(), weights)
    brain = torch.zeros(1, 12, 12, 6, dtype=torch.bool)
    brain[:, 2:-2, 2:-2] = True
    items = []
    for subject, dark in (("ill", [1, 4]), ("well", [])):
        image, lesion = torch.where(brain, 0.8, 0.0), np.zeros((12, 12, 6), dtype=np.uint8)
        image[:, 4:8, 4:8, dark], lesion[4:8, 4:8, dark] = 0.2, 1
        item = {
            "subject": subject,
            "image": MetaTensor(image, affine=AFFINE, meta={"intensity_unit": [1.0]}),
            "input": MetaTensor(image, affine=AFFINE),
            "brain": MetaTensor(brain, affine=AFFINE),
        }
        path = save_nifti(tmp_path / f"{subject}.nii.gz", lesion, AFFINE)
        items.append(item | ({"lesion": str(path)} if dark else {}))
    preprocessing = BrainPreprocessing(spacing_mm=2.0, percentile=98.0, upper=0.8, canvas=12)
    task = Evaluate(str(tmp_path / "result.json"), baselines=False)
    evaluator = DetectionEvaluator(
        bundle="dae",
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), collate_fn=list_data_collate),
        network=network,
        weights=str(weights),
        preprocessing=preprocessing,
        task=task,
        postprocessing=Outputs(),
    )
    evaluator.run()
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    for name in ("image_auroc_method", "image_auprc_method", "volume_auroc_method"):
        assert result[name]["value"] == 1, name
    assert result["image_auroc"]["value"] == result["volume_auroc"]["value"] == 0.5
    given = np.reshape(result["slice_scores"]["method_score"], (2, 6))
    np.testing.assert_allclose(given[0], np.isin(range(6), [1, 4]) * 16 / 144, rtol=1e-5)
    assert not given[1].any()


class Outputs:
    """What a postprocessing makes of a prediction on the network's grid, which is the input's."""

    segmentation: ClassVar = {}

    def __call__(self, data):
        anomaly_map, reconstruction = (MetaTensor(data["pred"][i : i + 1].as_tensor(), affine=AFFINE) for i in (0, 1))
        volumes = {"anomaly_map": anomaly_map, "reconstruction": reconstruction, "segmentation": anomaly_map > 2}
        return dict(data) | volumes | {"threshold": 2.0}
