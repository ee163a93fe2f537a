import numpy as np
import pytest
import torch
from arrays import GOLDEN

from common.detection.alignment import by_boxes
from common.detection.normalisation import WithinSubjectNormalisation, minus_mirrored, robust_z, smoothed_inside
from common.errors import SettingError


@pytest.fixture(scope="module")
def steps():
    with np.load(GOLDEN / "own_control" / "steps.npz") as arrays:
        return dict(arrays)


def ellipsoid(shape, margin=2):
    """A brain that fills its array but for a margin."""
    axes = [np.linspace(-1, 1, size - 2 * margin) for size in shape]
    inside = sum(x**2 for x in np.meshgrid(*axes, indexing="ij")) <= 1
    return np.pad(inside, margin)


def a_map(seed, shape=(30, 36, 28), gain=1.0, offset=0.0):
    """A map of noise (1, H, W, D), and its brain."""
    brain = ellipsoid(shape)
    noise = np.random.default_rng(seed).gamma(2.0, 1.0, shape)
    values = np.where(brain, gain * smoothed_inside(noise, brain, 1.0) + offset, 0)
    return torch.from_numpy(values.astype(np.float32))[None], torch.from_numpy(brain)[None]


def test_each_step_is_the_golden_one(steps):
    brain = steps["brain"]
    z, scale = robust_z(steps["map"], brain)
    np.testing.assert_allclose(z, steps["robust_z"], rtol=1e-5, atol=1e-5)
    assert scale == pytest.approx(float(steps["mad"]), rel=1e-6)
    minus_atlas = np.where(brain, z - steps["atlas"], 0)
    np.testing.assert_allclose(minus_atlas, steps["minus_atlas"], rtol=1e-5, atol=1e-5)
    minus_contralateral = minus_mirrored(minus_atlas, brain, by_boxes(brain), 0.5)
    np.testing.assert_allclose(minus_contralateral, steps["minus_contralateral"], rtol=1e-5, atol=1e-5)
    smoothed = smoothed_inside(minus_contralateral, brain, 1.5)
    np.testing.assert_allclose(smoothed, steps["smoothed"], rtol=1e-4, atol=1e-5)


def test_the_steps_in_their_order(steps, monkeypatch):
    brain = steps["brain"]
    monkeypatch.setattr("common.detection.normalisation.from_atlas", lambda *arguments: steps["atlas"][None])
    normalised, _ = WithinSubjectNormalisation()(torch.from_numpy(steps["map"])[None], torch.from_numpy(brain)[None])
    np.testing.assert_allclose(normalised[0].numpy(), steps["smoothed"], rtol=1e-4, atol=1e-5)


def test_gain_and_offset_of_a_scanner_do_not_matter():
    normalise = WithinSubjectNormalisation()
    here, scale = normalise(*a_map(1))
    there, scale_there = normalise(*a_map(1, gain=3.0, offset=0.2))
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
    assert scale_there == pytest.approx(3 * scale, rel=1e-3)


def test_what_is_usual_at_a_place_is_expected_there():
    subjects = []
    for seed in range(6):
        anomaly_map, brain = a_map(seed)
        anomaly_map[0, 8:12, 8:12, 12:16] += 3
        subjects.append((anomaly_map, brain))
    normalise = WithinSubjectNormalisation(contralateral_weight=0)
    before = normalise(*subjects[0])[0][0, 10, 10, 14]
    normalise.fit([normalise.healthy_map(*subject) for subject in subjects])
    assert normalise(*subjects[0])[0][0, 10, 10, 14] < before / 3


def test_the_atlas_fits_a_brain_of_another_size():
    normalise = WithinSubjectNormalisation(contralateral_weight=0, smoothing_vox=0)
    anomaly_map, brain = a_map(0, shape=(40, 50, 44))
    anomaly_map[0, 10:16, 12:18, 20:26] += 5
    normalise.fit([normalise.healthy_map(anomaly_map, brain)])
    large = torch.nn.functional.interpolate(anomaly_map[None, :, 2:-2, 2:-2, 2:-2], (54, 69, 60), mode="trilinear")[0]
    large_brain = torch.from_numpy(ellipsoid((58, 73, 64)))[None]
    large = torch.nn.functional.pad(large, (2,) * 6) * large_brain
    unfitted = WithinSubjectNormalisation(contralateral_weight=0, smoothing_vox=0)
    region = (0, slice(18, 19), slice(21, 22), slice(33, 34))  # the middle of the raised cube
    assert normalise(large, large_brain)[0][region].mean() < unfitted(large, large_brain)[0][region].mean() / 3


def test_a_healthy_subject_is_compared_with_the_others():
    """With two subjects the atlas of the others is the other one, so what one of them has alone stays."""
    odd, plain = a_map(0), a_map(1)
    odd[0][0, 8:14, 8:14, 10:16] += 5
    normalise = WithinSubjectNormalisation(contralateral_weight=0)
    values = normalise.fit([normalise.healthy_map(*subject) for subject in (odd, plain)])
    assert np.quantile(values[0], 0.999) > normalise(*odd)[0].max() * 1.5


def test_one_side_alone_stands_out_and_both_do_not():
    anomaly_map, brain = a_map(3)
    anomaly_map[0, 6:10, 12:18, 12:18] += 4
    one = WithinSubjectNormalisation()(anomaly_map, brain)[0]
    anomaly_map[0, 20:24, 12:18, 12:18] += 4
    both = WithinSubjectNormalisation()(anomaly_map, brain)[0]
    assert both[0, 7:9, 13:17, 13:17].mean() < 0.7 * one[0, 7:9, 13:17, 13:17].mean()
    without = WithinSubjectNormalisation(contralateral_weight=0)(anomaly_map, brain)[0]
    assert without[0, 7:9, 13:17, 13:17].mean() > one[0, 7:9, 13:17, 13:17].mean() * 0.9


def alternating(seed):
    """A map of noise, its brain, and a change whose sign is another one in each voxel."""
    anomaly_map, brain = a_map(seed)
    parity = torch.arange(brain[0].numel()).view(brain.shape) % 2
    return anomaly_map, brain, (parity * 2 - 1) * 0.1


@pytest.mark.parametrize("sign", [1, -1], ids=["darker", "brighter"])
def test_what_is_darker_or_brighter_as_a_whole_stands_out_of_what_alternates(sign):
    signed = WithinSubjectNormalisation(signed_smoothing_vox=2.0, contralateral_weight=0)
    unsigned = WithinSubjectNormalisation(contralateral_weight=0)
    healthy = [alternating(seed) for seed in range(4)]
    anomaly_map, brain, change = alternating(5)
    region = (0, slice(6, 13), slice(12, 19), slice(12, 19))
    change[region] = 0.1 * sign
    found = []
    for normalise in (signed, unsigned):
        normalise.fit([normalise.healthy_map(*subject) for subject in healthy])
        result, _ = normalise(anomaly_map, brain, change)
        found.append(float(result[region].mean() / np.quantile(normalise(*alternating(6))[0][brain], 0.99)))
    assert found[0] > 2 > found[1]


def test_darker_and_brighter_count_alike_in_healthy_brains():
    def uneven(seed):
        anomaly_map, brain, change = alternating(seed)
        patches = torch.from_numpy(np.random.default_rng(seed).random(brain.shape) > 0.999)
        bright = torch.nn.functional.max_pool3d(patches.float(), 5, 1, 2) > 0
        return anomaly_map + 3 * bright * brain, brain, torch.where(bright, -0.1, change)

    normalise = WithinSubjectNormalisation(signed_smoothing_vox=2.0, contralateral_weight=0)
    normalise.fit([normalise.healthy_map(*uneven(seed)) for seed in range(4)])
    assert 0 < normalise.brighter_factor < 0.7  # what is often bright is worth less


def test_rounding_has_no_sign():
    anomaly_map, brain, change = alternating(0)
    change[0, 15:] = 0  # as where a method hands the image back
    normalise = WithinSubjectNormalisation(signed_smoothing_vox=2.0)
    exact, rounded = (normalise(anomaly_map, brain, change + noise)[0] for noise in (0, -6e-8))
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.01 * float(exact.max()))


def test_without_a_sign_the_change_is_not_looked_at_and_with_one_it_is_needed():
    anomaly_map, brain, change = alternating(0)
    plain = WithinSubjectNormalisation()
    torch.testing.assert_close(plain(anomaly_map, brain, change), plain(anomaly_map, brain))
    assert "brighter_factor" not in plain.state_dict()
    with pytest.raises(ValueError, match="give the change"):
        WithinSubjectNormalisation(signed_smoothing_vox=2.0)(anomaly_map, brain)


@pytest.mark.parametrize("shape", [(1, 12, 12, 1), (1, 3, 3, 3), (1, 20, 20, 10)])
def test_flat_empty_and_tiny_volumes(shape):
    for brain in (torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)):
        normalised, scale = WithinSubjectNormalisation()(torch.full(shape, 0.3) * brain, brain)
        assert normalised.shape == shape
        assert torch.isfinite(normalised).all()
        assert (normalised == 0).all()
        assert scale > 0


def test_outside_the_brain_is_0_and_the_input_stays():
    anomaly_map, brain = a_map(5)
    before = anomaly_map.clone()
    normalised, _ = WithinSubjectNormalisation()(anomaly_map, brain)
    assert (normalised[~brain] == 0).all()
    assert torch.equal(anomaly_map, before)


def test_the_atlas_travels_with_the_weights():
    fitted = WithinSubjectNormalisation()
    fitted.fit([fitted.healthy_map(*a_map(seed)) for seed in range(3)])
    loaded = WithinSubjectNormalisation()
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded(*a_map(9))[0], fitted(*a_map(9))[0])
    assert loaded.scale_quantiles[0] <= loaded.scale_quantiles[-1]


@pytest.mark.parametrize("settings", [{"contralateral_weight": 1.5}, {"smoothing_vox": -1}])
def test_settings_out_of_their_range(settings):
    with pytest.raises(SettingError):
        WithinSubjectNormalisation(**settings)
