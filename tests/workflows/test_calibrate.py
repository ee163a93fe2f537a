"""Calibration: of the map, of its normalisation, and of a threshold that the method has of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.networks.nets import DiffusionModelUNet
from scipy import ndimage
from torch import nn

from common.detection.fingerprint import of_map
from common.detection.normalisation import ATLAS_SUBJECTS, WithinSubjectNormalisation
from common.detection.volume import VolumeDetector
from common.diffusion.gaussian import GaussianScheduler
from common.errors import BundleError, CohortError
from common.methods.iter_mask2 import IterMask2
from common.methods.latent_ddpm import LatentDDPM
from common.networks.latent_space import LatentSpace
from common.networks.vq_autoencoder import VQAutoencoder
from common.networks.weight_standardised_unet import WeightStandardisedUNet
from common.transforms.pipeline import BrainPreprocessing
from common.transforms.postprocess import read_calibration
from common.weights import load_into, load_weights, save_weights
from common.workflows.calibrate import Calibrate, threshold_interval, threshold_of
from common.workflows.slices import SliceDataset

SHAPE = (24, 28, 20)


def network(normalisation=None):
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(channels=(4,), num_res_layers=1, num_embeddings=8, embedding_dim=4)
    unet = DiffusionModelUNet(2, 4, 4, 1, (4,), (False,), norm_num_groups=2, num_head_channels=4)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    scheduler = GaussianScheduler(10, beta_end=0.3)
    settings = {"kl_range": (4, 6), "healing_start": 5, "num_score_timesteps": 9}
    method = LatentDDPM(LatentSpace(autoencoder, 2), unet, scheduler, (4, 4), **settings)
    return VolumeDetector(method, normalisation=normalisation)


def masking_network():
    torch.manual_seed(0)
    networks = [WeightStandardisedUNet(c, (4, 8), (2, 2), out_channels=1) for c in (1, 2)]
    return VolumeDetector(IterMask2(*networks, radius=2.0, canvas=8))


def preprocessing():
    return BrainPreprocessing(spacing_mm=2.0, percentile=98.0, upper=0.8, canvas=8, strip="atlas")


@pytest.fixture
def dataset():
    image = torch.rand(1, 8, 8, 11, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    return SliceDataset([{"image": image}], lambda item: {"image": MetaTensor(item["image"])})


@pytest.fixture
def weights(tmp_path):
    """Of a network that was not calibrated, in a folder of their own."""

    def save(volume):
        path = tmp_path / "weights" / "model.pt"
        save_weights(volume.state_dict(), path)
        return path

    return save


def subject(values, brain=None, **item):
    """An item of the cohort, and the network's output: what is around the brain and the reconstruction are large."""
    values = torch.as_tensor(values, dtype=torch.float32)
    brain = torch.ones(values.shape, dtype=torch.bool) if brain is None else torch.as_tensor(brain)
    pred = torch.stack([torch.where(brain, values, 1e4), torch.full(values.shape, 1e5)])
    return {"subject": "a", **item}, {"pred": MetaTensor(pred), "image": MetaTensor(0.5 * brain[None])}


def one_to_hundred(**item):
    return subject(torch.arange(1.0, 101).view(10, 10, 1), **item)


def person(seed, gain=1.0, **item):
    """A map of smooth noise, brighter to the front, in a brain that is a box."""
    noise = 30 * ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 2.0)
    noise += np.linspace(0, 3, SHAPE[1])[None, :, None]
    brain = np.zeros(SHAPE, dtype=bool)
    brain[1:-1, 1:-1, 1:-1] = True
    return subject(gain * noise, brain, **item)


def calibrate(volume, path, subjects, **settings):
    """Run the handlers as `calibrate.json` does; return the weights that are written."""
    outputs = [output for _, output in subjects]
    evaluator = Engine(lambda engine, batch: [outputs[engine.state.iteration - 1]])
    load_into(volume, path)
    evaluator.network, evaluator.weights, evaluator.preprocessing = volume, str(path), preprocessing()
    Calibrate(**settings).attach(evaluator)
    evaluator.run([[item] for item, _ in subjects], max_epochs=1)
    return load_weights(settings.get("output", path))


def report(path):
    return json.loads(path.with_suffix(".calibration.json").read_text(encoding="utf-8"))


def test_map_is_calibrated(weights):
    path = weights(network())
    stored = calibrate(network(), path, [one_to_hundred()])
    assert 98 < stored["calibration.threshold"] < 100
    assert (stored["calibration.score_quantiles"] == 100).all()
    assert stored["calibration.subjects"] == 1
    assert read_calibration(path).settings == of_map(network(), preprocessing())
    assert (stored["detector.threshold"] == 0).all()


def test_only_the_brain_counts_and_as_much_of_it_is_above_as_was_asked_for(weights):
    half = torch.arange(100).view(10, 10, 1) < 50
    subjects = [one_to_hundred(), subject(torch.arange(1.0, 101).view(10, 10, 1), half)]
    stored = calibrate(network(), weights(network()), subjects, false_positive_share=0.1)
    values = np.concatenate([np.arange(1.0, 101), np.arange(1.0, 51)])
    assert stored["calibration.threshold"].item() == pytest.approx(np.quantile(values, 0.9))
    assert stored["calibration.false_positive_share"] == 0.1
    assert stored["calibration.score_quantiles"][[0, -1]].tolist() == [50, 100]


def test_all_but_the_calibration_stays(weights):
    volume = network(WithinSubjectNormalisation())
    path = weights(volume)
    before = load_weights(path)
    after = calibrate(volume, path, [person(seed) for seed in range(2)])
    assert after.keys() == before.keys()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert same == {name for name in before if not name.startswith(("calibration.", "normalisation."))}


def test_output_elsewhere_leaves_the_weights_untouched(weights, tmp_path):
    path = weights(network())
    before, output = path.read_bytes(), tmp_path / "new" / "site.pt"
    stored = calibrate(network(), path, [one_to_hundred()], output=str(output))
    assert stored["calibration.subjects"] == 1
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]
    assert {file.name for file in output.parent.iterdir()} == {"site.pt", "site.calibration.json"}


def test_subject_with_a_lesion_is_refused_and_nothing_is_written(weights):
    path = weights(network())
    before = path.read_bytes()
    with pytest.raises(CohortError, match="sub-7: has a lesion; calibrate on healthy subjects only"):
        calibrate(network(), path, [one_to_hundred(), one_to_hundred(subject="sub-7", lesion="lesion.nii.gz")])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_maps_that_are_zero_give_no_threshold_and_nothing_is_written(weights, tmp_path):
    path = weights(network())
    before = path.read_bytes()
    with pytest.raises(BundleError, match=r"0\.99 of all values are at most 0.*train it on"):
        calibrate(network(), path, [subject(torch.zeros(SHAPE), subject=name) for name in "abcd"])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("signed", [0.0, 2.0])
def test_threshold_is_that_of_the_normalised_map(weights, signed):
    subjects = [person(seed) for seed in range(4)]
    path = weights(network(WithinSubjectNormalisation(signed_smoothing_vox=signed)))
    stored = calibrate(network(WithinSubjectNormalisation(signed_smoothing_vox=signed)), path, subjects)
    expected, maps = WithinSubjectNormalisation(signed_smoothing_vox=signed), []
    for _, output in subjects:
        values, image = output["pred"].as_tensor(), output["image"]
        maps.append(expected.healthy_map(values[:1], image > 0, values[1:] - image))
    values = expected.fit(maps)
    assert stored["calibration.threshold"].item() == pytest.approx(threshold_of(values, 0.01))
    assert stored["calibration.threshold"] != pytest.approx(
        threshold_of([m.z[0, m.brain] for m in maps], 0.01), rel=0.1
    )
    assert torch.equal(stored["normalisation.scale_quantiles"], expected.scale_quantiles)
    torch.testing.assert_close(stored["normalisation.atlas"].float(), expected.atlas, rtol=1e-2, atol=1e-3)
    assert stored["normalisation.atlas"].abs().max() > 0.5


def test_gain_of_a_scanner_does_not_move_the_threshold_of_a_normalised_map(weights):
    thresholds = []
    for gain in (1.0, 10.0):
        path = weights(network(WithinSubjectNormalisation()))
        subjects = [person(seed, gain=gain if seed % 2 else 1.0) for seed in range(4)]
        stored = calibrate(network(WithinSubjectNormalisation()), path, subjects)
        thresholds.append(float(stored["calibration.threshold"]))
    assert thresholds[0] > 0
    assert thresholds[1] == pytest.approx(thresholds[0], rel=1e-3)


def test_few_subjects_keep_the_atlas_and_fit_the_rest(weights):
    path = weights(network(WithinSubjectNormalisation()))
    many = calibrate(network(WithinSubjectNormalisation()), path, [person(seed) for seed in range(ATLAS_SUBJECTS)])
    few = [person(seed, gain=2.0) for seed in range(100, 100 + ATLAS_SUBJECTS - 1)]
    again = calibrate(network(WithinSubjectNormalisation()), path, few)
    assert torch.equal(again["normalisation.atlas"], many["normalisation.atlas"])
    assert (again["normalisation.scale_quantiles"] > 1.5 * many["normalisation.scale_quantiles"]).all()
    assert again["calibration.threshold"] != many["calibration.threshold"]
    assert again["calibration.subjects"] == ATLAS_SUBJECTS - 1
    enough = calibrate(network(WithinSubjectNormalisation()), path, [*few, person(99)])
    assert not torch.equal(enough["normalisation.atlas"], many["normalisation.atlas"])


def test_few_subjects_fit_an_atlas_where_there_is_none(weights):
    stored = calibrate(
        network(WithinSubjectNormalisation()),
        weights(network(WithinSubjectNormalisation())),
        [person(seed) for seed in range(2)],
    )
    assert stored["normalisation.atlas"].any()


def test_interval_is_stored_and_reported(weights):
    path = weights(network())
    stored = calibrate(network(), path, [subject(torch.rand(10, 10, 5) * size) for size in (1, 2, 3, 4, 5)])
    low, high = stored["calibration.threshold_interval"].tolist()
    assert low < stored["calibration.threshold"] < high
    assert read_calibration(path).threshold_interval.tolist() == [low, high] == report(path)["interval"]
    assert report(path)["threshold"] == stored["calibration.threshold"]


def test_interval_says_how_much_depends_on_the_subjects():
    def values(count, spread):
        random = np.random.default_rng(0)
        return [random.gamma(2, 1, 3000) * random.uniform(1, 1 + spread) for _ in range(count)]

    def width(subjects):
        low, high = threshold_interval(subjects, 0.01)
        assert low <= threshold_of(subjects, 0.01) <= high
        return high - low

    assert width(values(10, 0.0)) < width(values(10, 0.2)) < width(values(10, 2.0))
    assert width(values(80, 2.0)) < 0.6 * width(values(10, 2.0))
    assert threshold_interval([np.arange(100.0)] * 3, 0.1) == pytest.approx([threshold_of([np.arange(100.0)], 0.1)] * 2)


def test_report_of_each_site(weights, capsys):
    """Two subjects of one site are like each other; the other site's map is lower all over."""
    path = weights(network())
    low = torch.arange(1.0, 101).view(10, 10, 1) / 2
    subjects = [one_to_hundred(site="A"), subject(low, site="B"), subject(low + 50, site="A")]
    stored = calibrate(network(), path, subjects, false_positive_share=0.05)
    threshold = float(stored["calibration.threshold"])
    shares = [float((output["pred"][0] > threshold).float().mean()) for _, output in subjects]
    sites = report(path)["sites"]
    assert sites.keys() == {"A", "B"}
    assert (sites["A"]["subjects"], sites["B"]["subjects"]) == (2, 1)
    assert sites["A"]["healthy_share"] == pytest.approx((shares[0] + shares[2]) / 2)
    assert sites["A"]["worst_healthy_share"] == pytest.approx(max(shares))
    assert sites["B"] == {"subjects": 1, "healthy_share": 0, "worst_healthy_share": 0}
    first, *others, _ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"threshold {threshold:.4g}, 95 % interval ")
    assert [line.split(",")[0] for line in others] == ["A: 2 subjects", "B: 1 subjects"]
    assert f"{sites['A']['healthy_share']:.2%} of a healthy brain above it" in others[0]


def test_without_sites_the_report_is_of_all(weights, capsys):
    path = weights(network())
    calibrate(network(), path, [one_to_hundred()])
    assert report(path)["sites"][""]["healthy_share"] == pytest.approx(0.01)
    assert "all: 1 subjects, 1.00% of a healthy brain" in capsys.readouterr().out


@pytest.mark.parametrize("make", [network, masking_network])
def test_threshold_of_the_method_is_fitted_and_written_in_full_precision(dataset, weights, make):
    volume = make()
    path = weights(volume)
    stored = calibrate(volume, path, [one_to_hundred()], slices=dataset)
    assert stored["detector.threshold"].dtype == torch.float64
    assert stored["detector.threshold"].any()
    expected = make()
    load_into(expected, path)
    assert torch.equal(expected.detector.threshold, volume.detector.threshold)
    expected.detector.fit_threshold(torch.stack([item["image"] for item in dataset]).split(4))  # other batches
    torch.testing.assert_close(expected.detector.threshold, stored["detector.threshold"], rtol=1e-4, atol=0)
    assert stored["calibration.threshold"].isfinite()
