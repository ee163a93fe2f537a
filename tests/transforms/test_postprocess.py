"""From the prediction to map, reconstruction and segmentation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd
from monai.utils import convert_to_tensor

from common.detection.calibration import Calibration
from common.detection.normalisation import SCALE_QUANTILES, WithinSubjectNormalisation
from common.errors import BundleError
from common.transforms.pipeline import BrainPreprocessing
from common.transforms.postprocess import (
    NormaliseWithinSubjectd,
    Postprocessing,
    ScoreVolumed,
    SegmentAnomaliesd,
    SplitPredictiond,
    segment,
    shipped_threshold,
)
from common.weights import save_weights

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
OWN_MODES = (0.28, 0.53, 0.75)  # of CSF, grey and white matter


def write_weights(path, **parts):
    """A weights file of these parts of a network."""
    state = {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}
    save_weights(state, path)
    return path


def make_map():
    """(1, 12, 12, 12) with components of 1, 4 and 27 voxels at 0.5 over 0.1."""
    values = torch.full((1, 12, 12, 12), 0.1)
    values[0, 1, 1, 1] = 0.5
    values[0, 4:6, 4:6, 1] = 0.5
    values[0, 7:10, 7:10, 7:10] = 0.5
    return MetaTensor(values, affine=AFFINE)


@pytest.mark.parametrize(("voxels", "kept"), [(1, 32), (2, 31), (4, 31), (5, 27), (27, 27), (28, 0)])
@pytest.mark.parametrize("spacing_mm", [(2, 2, 2), (0.9, 0.9, 3), (0.7, 1.1, 1.3)])
def test_components_below_the_volume_are_removed(voxels, kept, spacing_mm):
    anomaly_map = make_map()
    anomaly_map.affine = np.diag([*spacing_mm, 1.0])
    volume_ml = voxels * np.prod(spacing_mm) / 1000
    result = SegmentAnomaliesd(threshold=0.3, min_volume_ml=volume_ml)({"pred": anomaly_map})
    assert int(result["segmentation"].sum()) == kept


def test_components_touch_at_their_corners():
    values = np.zeros((4, 4, 4))
    values[1, 1, 1] = values[2, 2, 2] = 1
    assert segment(values, 0.5, 2).sum() == 2


def test_threshold_is_exceeded_not_reached():
    assert not segment(np.full((3, 3, 3), 0.5), 0.5, 1).any()


def test_nothing_found_is_an_empty_mask():
    mask = segment(np.zeros((3, 3, 3)), 0.5, 1)
    assert mask.dtype == np.uint8
    assert not mask.any()


def test_prediction_is_the_mask_for_viewers_and_the_map_when_asked():
    result = SegmentAnomaliesd(threshold=0.3)({"pred": make_map()})
    assert result["pred"].dtype == torch.uint8
    assert torch.equal(result["pred"].as_tensor(), result["segmentation"].as_tensor())
    assert np.array_equal(result["segmentation"].affine, AFFINE)
    assert result["threshold"] == 0.3
    result = SegmentAnomaliesd(threshold=0.3, save_map=True)({"pred": make_map()})
    assert torch.equal(result["pred"].as_tensor(), make_map().as_tensor())


def test_threshold_comes_from_the_weights(tmp_path):
    calibration = Calibration()
    path = tmp_path / "model.pt"
    write_weights(path, calibration=calibration)
    with pytest.raises(BundleError, match="not calibrated"):
        SegmentAnomaliesd(weights=path)({"pred": make_map()})
    calibration.fit(0.3, 0.01, torch.rand(12))
    write_weights(path, calibration=calibration)
    result = SegmentAnomaliesd(weights=path)({"pred": make_map()})
    assert result["threshold"] == 0.3
    assert int(result["segmentation"].sum()) == 31
    with pytest.raises(BundleError, match="no weights"):
        SegmentAnomaliesd(weights=tmp_path / "none.pt")({"pred": make_map()})
    with pytest.raises(ValueError, match="threshold"):
        SegmentAnomaliesd()


def test_configs_show_the_threshold_if_there_is_one(tmp_path):
    calibration = Calibration()
    path = tmp_path / "model.pt"
    assert shipped_threshold(path) is None
    write_weights(path, calibration=calibration)
    assert shipped_threshold(path) is None
    calibration.fit(0.3, 0.01, torch.rand(12))
    write_weights(path, calibration=calibration)
    assert shipped_threshold(path) == 0.3


def test_score_is_json(tmp_path):
    """27 + 4 + 1 voxels of 0.5; the brain is the half with the 27, of which the highest 1 % are 9 of them."""
    calibration = Calibration()
    calibration.fit(0.2, 0.01, torch.linspace(0.3, 0.7, 101))
    path = tmp_path / "model.pt"
    write_weights(path, calibration=calibration)
    brain = MetaTensor(torch.arange(12).view(1, 12, 1, 1).expand(1, 12, 12, 12) >= 6, affine=AFFINE)
    anomaly_map = make_map() * brain
    data = {"anomaly_map": anomaly_map, "brain": brain, "threshold": 0.3}
    result = json.loads(json.dumps(ScoreVolumed(path)(data)["result"]))
    share, percentile = 27 / (6 * 12 * 12), 100 * 50 / 101
    assert result["threshold"] == 0.3
    assert result["volume_score"] == pytest.approx(0.5)
    assert result["volume_score_percentile"] == pytest.approx(percentile, abs=1)
    assert result["abnormal_share"] == pytest.approx(share)


@pytest.mark.parametrize("of_the_brain", [True, False])
def test_what_was_measured_decides_without_a_normalisation_too(tmp_path, of_the_brain):
    """A map in its own units has no scale; and a head CT has neither tissues nor a spacing that is known."""
    calibration = Calibration()
    calibration.fit(0.2, 0.01, torch.rand(12))
    path = tmp_path / "model.pt"
    save_weights({f"calibration.{name}": value for name, value in calibration.state_dict().items()}, path)
    thick = np.diag([2.0, 2.0, 5.0, 1.0])
    image = MetaTensor(torch.ones(1, 12, 12, 12), affine=thick)
    data = {"anomaly_map": image, "brain": MetaTensor(image > 0, affine=thick), "threshold": 0.3}
    if of_the_brain:
        measured = {"contrast_order": 0.1, "vessel_share": torch.tensor(np.nan, dtype=torch.float64)}
        data |= measured | {"tissue_modes": torch.tensor([[0.3, 0.6, 0.8]], dtype=torch.float64)}
        expected = {"contrast_order": 0.1, "vessel_share": None, "tissue_modes": [0.3, 0.6, 0.8]}
        said = ["T1", "slices of 5.0 mm"]
    else:
        data |= {"air_level": 2.0, "bone_share": 0.2}
        expected, said = {"air_level": 2.0, "bone_share": 0.2}, ["air"]
    result = json.loads(json.dumps(ScoreVolumed(path)(data)["result"], allow_nan=False))
    assert {name: result[name] for name in expected} == expected
    assert result["reliability"] == "unreliable"
    assert len(result["doubts"]) == len(said)
    assert all(word in doubt for word, doubt in zip(said, result["doubts"], strict=True))


def test_split():
    brain = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    brain[:, 1:3] = True
    pred = torch.full((3, 4, 4, 4), 0.5)
    pred[0, 1, 0, 0] = -1e-7  # interpolation may undershoot
    image = MetaTensor(torch.ones(2, 4, 4, 4), affine=AFFINE, meta={"intensity_unit": [10.0, 1000.0]})
    data = {"pred": MetaTensor(pred), "image": image, "brain": MetaTensor(brain, affine=AFFINE)}
    result = SplitPredictiond()(data)
    anomaly_map, reconstruction = result["anomaly_map"], result["reconstruction"]
    assert anomaly_map.shape == (1, 4, 4, 4)
    assert float(anomaly_map.min()) == 0
    assert not anomaly_map.as_tensor()[~brain].any()
    assert torch.equal(reconstruction.as_tensor()[:, brain[0]].amax(1), torch.tensor([5.0, 500.0]))
    assert not reconstruction.as_tensor()[:, ~brain[0]].any()
    assert np.array_equal(anomaly_map.affine, AFFINE)
    assert result["pred"] is anomaly_map


def test_reconstruction_has_the_field_of_the_image():
    brain = MetaTensor(torch.ones(1, 4, 4, 4, dtype=torch.bool), affine=AFFINE)
    image = MetaTensor(torch.ones(1, 4, 4, 4), affine=AFFINE, meta={"intensity_unit": [10.0]})
    smaller = MetaTensor(torch.full((1, 2, 4, 4), 3.0), affine=AFFINE)  # cropped to the brain: its border goes on
    smaller[:, 0] = 2.0
    data = {"pred": MetaTensor(torch.full((2, 4, 4, 4), 0.5)), "image": image, "brain": brain, "bias_field": smaller}
    result = SplitPredictiond()(data)
    torch.testing.assert_close(result["reconstruction"].as_tensor()[0, :, 0, 0], torch.tensor([10.0, 15.0, 15.0, 15.0]))
    assert torch.equal(result["anomaly_map"].as_tensor(), torch.full((1, 4, 4, 4), 0.5))


def test_reconstruction_is_not_darker_at_the_rim():
    """The network's grid holds the brain in its second half only; half way between, a value saw one half of it."""
    image = MetaTensor(torch.zeros(1, 4, 4, 4), affine=AFFINE, meta={"intensity_unit": [10.0]})
    image[:, 2:] = 0.7
    shifted = AFFINE.copy()
    shifted[0, 3] = 1.0  # the input's voxels lie between those of the network
    brain = MetaTensor(torch.zeros(1, 3, 4, 4, dtype=torch.bool), affine=shifted)
    brain[:, 1:] = True
    pred = MetaTensor(torch.tensor([0.0, 0.35, 0.7]).view(1, 3, 1, 1).expand(2, 3, 4, 4), affine=shifted)
    result = SplitPredictiond()({"pred": pred, "image": image, "brain": brain})
    torch.testing.assert_close(result["reconstruction"].as_tensor()[0, :, 0, 0], torch.tensor([0.0, 7.0, 7.0]))


def prediction(seed, gain=1.0):
    """Map and reconstruction of noise, (2, 20, 24, 18), and the image, whose brain is a box."""
    image = torch.zeros(1, 20, 24, 18)
    image[:, 2:-2, 3:-3, 2:-2] = 0.5
    pred = torch.rand(2, *image.shape[1:], generator=torch.Generator().manual_seed(seed)) * (image > 0)
    pred[0] *= gain
    return MetaTensor(pred, affine=AFFINE), MetaTensor(image, affine=AFFINE)


def to_normalise(pred, image):
    """What a normalisation takes."""
    values, image = (convert_to_tensor(x, track_meta=False) for x in (pred, image))
    return values[:1], image > 0, values[1:] - image.float()


def fitted(predictions, **settings):
    """A normalisation that has seen these healthy subjects."""
    normalisation = WithinSubjectNormalisation(**settings)
    normalisation.fit([normalisation.healthy_map(*to_normalise(pred, image)) for pred, image in predictions])
    return normalisation


@pytest.mark.parametrize("settings", [{}, {"signed_smoothing_vox": 2.0}], ids=["unsigned", "signed"])
def test_map_is_normalised_with_what_the_weights_hold(tmp_path, settings):
    normalisation = fitted((prediction(seed) for seed in range(3)), **settings)
    normalisation.atlas.copy_(normalisation.atlas.half())  # as files keep it
    path = write_weights(tmp_path / "model.pt", normalisation=normalisation)
    pred, image = prediction(5)
    before, own = pred.clone(), WithinSubjectNormalisation(**settings)  # as in a config whose network is not loaded
    result = NormaliseWithinSubjectd(own, path)({"pred": pred, "image": image})
    expected, scale = normalisation(*to_normalise(pred, image))
    assert torch.equal(result["pred"].as_tensor()[:1], expected)
    assert torch.equal(result["pred"].as_tensor()[1:], before.as_tensor()[1:])
    assert result["map_scale"] == scale
    assert torch.equal(own.atlas, normalisation.atlas)
    assert own.brighter_factor == normalisation.brighter_factor
    assert normalisation.atlas.any()
    assert torch.equal(pred.as_tensor(), before.as_tensor())
    not_there = NormaliseWithinSubjectd(normalisation, tmp_path / "none.pt")  # of a network that is loaded
    assert torch.equal(not_there({"pred": pred, "image": image})["pred"].as_tensor(), result["pred"].as_tensor())


def test_weights_without_an_atlas_are_refused(tmp_path):
    pred, image = prediction(0)
    path = write_weights(tmp_path / "model.pt", calibration=Calibration())
    with pytest.raises(BundleError, match=r"no normalisation\."):
        NormaliseWithinSubjectd(WithinSubjectNormalisation(), path)({"pred": pred, "image": image})


@pytest.fixture(scope="module")
def brain(phantom):
    """Three tissues in a brain of 3 mm, as an image in memory, of another contrast than the training data."""
    shape, affine = phantom.grid(spacing_mm=(3.0,) * 3)
    inside = phantom.on_grid(shape, affine)[1]
    draw = np.random.default_rng(0)
    kind = draw.choice(3, size=shape, p=(0.24, 0.5, 0.26))
    tissue = draw.normal(np.array(OWN_MODES)[kind], np.array([0.06, 0.03, 0.02])[kind]).clip(0.02, 0.9)
    return MetaTensor(torch.from_numpy(np.where(inside, 500 * tissue, 0).astype(np.float32))[None], affine=affine)


def prepared(brain, **settings):
    preprocessing = BrainPreprocessing(spacing_mm=3.0, percentile=98.0, upper=0.8, canvas=48, **settings)
    return preprocessing, preprocessing({"image": brain.clone()})


@pytest.mark.parametrize(("gain", "reliability"), [(1.0, "ok"), (3.0, "unreliable")])
def test_prediction_becomes_what_is_written(gain, reliability, brain, tmp_path):
    """Residuals that are larger everywhere change nothing of the map, but are told."""
    preprocessing, item = prepared(brain)
    image = item["image"]
    inside = (image > 0).as_tensor()

    def noise(seed):
        return torch.rand(image.shape, generator=torch.Generator().manual_seed(seed)) * inside

    normalisation, calibration = fitted((MetaTensor(noise(seed)), inside) for seed in range(3)), Calibration()
    calibration.fit(2.5, 0.01, torch.linspace(1, 3, 20))
    path = write_weights(tmp_path / "model.pt", normalisation=normalisation, calibration=calibration)
    lesion = torch.zeros(image.shape, dtype=torch.bool)
    lesion[:, 12:17, 22:27, 12:17] = True  # on one side of the brain
    item["pred"] = MetaTensor(torch.cat([gain * (noise(7) + 4 * lesion), image.as_tensor()]), affine=image.affine)
    segmentation = {"threshold": None, "min_volume_ml": 0.5, "save_map": True}
    result = Postprocessing(preprocessing, str(path), segmentation, WithinSubjectNormalisation())(item)

    anomaly_map, found = result["anomaly_map"].as_tensor(), result["segmentation"].as_tensor()
    assert anomaly_map.shape == found.shape == brain.shape
    assert anomaly_map.min() == 0 and not anomaly_map[brain.as_tensor() == 0].any()
    assert result["threshold"] == 2.5
    assert torch.equal(result["pred"].as_tensor(), anomaly_map)
    assert 125 <= int(found.sum()) < 500  # the lesion, with what smoothing adds, and nothing else
    numbers = json.loads(json.dumps(result["result"], allow_nan=False))
    assert numbers["reliability"] == reliability
    assert [doubt.split(" times as much")[0][-3:] for doubt in numbers["doubts"]] == ["3.0"] * (gain > 1)
    assert numbers["map_scale"] == pytest.approx(gain * 0.25, rel=0.1)
    assert numbers["volume_score"] > 2.5


def test_reconstruction_has_the_contrast_and_the_units_of_the_image(brain):
    """A network that changes nothing gives the image back, although it saw the tissues of the training data."""
    preprocessing, item = prepared(brain, tissue_modes=[0.37, 0.62, 0.76])
    from_, to = np.reshape(item["image"].meta["tissue_knots"], (2, -1))
    assert np.abs(from_ - to)[1:4].max() > 0.05
    item["pred"] = torch.cat([item["image"]] * 2)
    back = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(item)
    inside = brain.as_tensor() > 0
    reconstruction = SplitPredictiond()(back)["reconstruction"].as_tensor()
    assert (reconstruction - brain.as_tensor())[inside].abs().mean() < 0.01 * brain.max()
    del back["image"].meta["tissue_knots"]
    other = SplitPredictiond()(back)["reconstruction"].as_tensor()
    assert (other - brain.as_tensor())[inside].abs().mean() > 0.03 * brain.max()


@pytest.mark.parametrize(
    ("spacing_mm", "found", "doubts"),
    [
        (2.0, {}, []),
        (4.0, {}, []),  # nothing is known of a bundle that does not normalise
        (2.0, {"map_scale": 1.3}, []),
        (2.0, {"map_scale": 2.0}, ["differs from the image 4.0 times as much as in a healthy subject"]),
        (2.0, {"map_scale": 1.0, "tissue_modes": np.array([0.3, 0.6, 0.8])}, []),
        (2.0, {"map_scale": 1.0, "tissue_modes": np.full(3, np.nan)}, ["do not show as in a T1 image"]),
        (4.0, {"map_scale": 2.0}, ["differs from the image"]),  # of a whole head nobody knows the spacing
        (
            4.0,
            {"map_scale": 2.0, "tissue_modes": np.array([0.3, 0.6, 0.8])},
            ["differs from the image", "slices of 4.0 mm"],
        ),
    ],
)
def test_score_says_whether_it_can_be_believed(spacing_mm, found, doubts, tmp_path):
    """The scales of the healthy go from 0 to 1, so that the middle one is 0.5."""
    calibration, normalisation = Calibration(), WithinSubjectNormalisation()
    calibration.fit(0.2, 0.01, torch.linspace(0.3, 0.7, 101))
    normalisation.scale_quantiles.copy_(torch.linspace(0, 1, SCALE_QUANTILES))
    path = write_weights(tmp_path / "model.pt", calibration=calibration, normalisation=normalisation)
    affine = np.diag([1.0, 1.0, spacing_mm, 1.0])
    volumes = {"anomaly_map": make_map(), "brain": MetaTensor(torch.ones(1, 12, 12, 12), affine=affine)}
    result = json.loads(json.dumps(ScoreVolumed(path)(volumes | {"threshold": 0.3} | found)["result"], allow_nan=False))
    assert result["reliability"] == ("unreliable" if doubts else "ok")
    assert len(result["doubts"]) == len(doubts)
    assert all(part in doubt for part, doubt in zip(doubts, result["doubts"], strict=True))
    assert result.get("map_scale") == found.get("map_scale")
    modes = found.get("tissue_modes")
    assert result.get("tissue_modes") == (None if modes is None or np.isnan(modes).any() else modes.tolist())
