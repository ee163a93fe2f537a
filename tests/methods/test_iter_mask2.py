"""IterMask2 against the published formulas (golden/iter_mask2/README.md), and the contract of a method."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from arrays import generators, golden, slices
from torch import nn

from common.detection.method import foreground_of
from common.errors import BundleError, ImageShapeError, SettingError
from common.methods import iter_mask2
from common.methods.iter_mask2 import (
    IterMask2,
    IterMask2Objective,
    exceeded_by_share,
    healthy_threshold,
    high_frequencies,
    low_frequencies,
    random_mask,
    squares,
    to_network,
)
from common.networks.weight_standardised_unet import WeightStandardisedUNet
from common.workflows.training_handlers import ExponentialMovingAverage


class Counted(nn.Module):
    """A network that is a formula, and remembers what it saw."""

    size_divisor = 1

    def __init__(self, formula, in_channels=1, out_channels=1):
        super().__init__()
        self.formula, self.in_channels, self.out_channels = formula, in_channels, out_channels
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.formula(x)


def toy(tau=0.45, **settings):
    """The networks of the golden loop."""
    first = Counted(lambda c: 0.6 * c - 0.1)
    second = Counted(lambda x: 0.5 * F.avg_pool2d(x[:, :1].clamp(-2, 2), 5, 1, 2) + 0.7 * x[:, 1:], in_channels=2)
    detector = IterMask2(first, second, **{"radius": 5.0, "canvas": 24, **settings}).eval()
    detector.threshold.fill_(tau)
    return detector


def tiny(channels=1, **settings):
    """Networks with random weights, a canvas of 16 pixels and a threshold that lets masks shrink."""
    first = WeightStandardisedUNet(channels, (4, 8), (2, 2))
    second = WeightStandardisedUNet(2 * channels, (4, 8), (2, 2), out_channels=channels)
    detector = IterMask2(first, second, **{"radius": 2.0, "canvas": 16, **settings}).eval()
    for parameter in detector.parameters():
        nn.init.normal_(parameter, std=0.3)
    detector.threshold.fill_(2.0)
    return detector


def ellipse(size=96):
    """A brain of 170 x 136 mm on pixels of 2 mm."""
    offset = torch.arange(size) - size / 2
    return (offset[:, None] / 42.5) ** 2 + (offset / 34) ** 2 < 1


# --- frequencies ---


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_amplitudes_of_low_frequencies_are_replaced_and_their_phases_kept(case):
    g = golden("iter_mask2/frequency")
    v = g[f"x_{case}"]
    low = low_frequencies(v.shape[2:], float(g[f"radius_{case}"]))
    assert torch.equal(low, g[f"low_{case}"])
    torch.testing.assert_close(high_frequencies(v, low), g[f"cond_{case}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(high_frequencies(v, low, 0.0), g[f"removed_{case}"], atol=1e-5, rtol=0)


def test_frequencies_below_the_radius_go_and_those_from_it_on_stay():
    across = torch.arange(96) * 2 * torch.pi / 96
    for cycles, stays in [(5, False), (11, False), (12, True), (20, True)]:
        wave = torch.cos(cycles * across).expand(1, 1, 96, 96)
        rest = tiny(radius=12.0, canvas=96, low_amplitude=0.0).condition(wave)
        torch.testing.assert_close(rest, wave * stays, atol=1e-4, rtol=0)


def test_larger_slices_are_cut_at_the_same_wavelength():
    detector = tiny(radius=12.0, canvas=96, low_amplitude=0.0)
    for pixels, stays in [(9, False), (7, True)]:  # of a cycle: 8 for 12 cycles on the canvas
        rows, columns = torch.arange(pixels * 18) * 2 * torch.pi / pixels, torch.arange(pixels * 14)
        wave = torch.cos(rows)[:, None].expand(1, 1, len(rows), len(columns))
        for v in (wave, wave.mT):
            torch.testing.assert_close(detector.condition(v), v * stays, atol=1e-4, rtol=0)


def test_condition_hides_the_intensities_and_shows_the_edges():
    v = torch.full((1, 1, 96, 96), -3.0)
    v[..., 20:76, 20:76] = 1.0
    shown = tiny(radius=12.0, canvas=96).condition(v)
    assert shown.mean().abs() < 1e-3  # of -1.6
    assert shown[..., 40:56, 40:56].abs().max() < 0.3
    assert shown[..., 48, 18:22].abs().max() > 1
    removed = tiny(radius=12.0, canvas=96, low_amplitude=0.0).condition(v)
    assert 0 < (shown - removed).abs().max() < 0.05  # what the phases of the low frequencies add


def test_the_second_network_sees_the_edges_of_what_noise_covers():
    detector, v = toy(), torch.randn(1, 1, 24, 24)
    mask = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    mask[..., 5:15, 5:15] = True
    detector.rebuild(v, mask, detector.condition(v), generators(1))
    covered, condition = detector.network.seen[0].split(1, dim=1)
    assert torch.equal(condition, detector.condition(v))
    assert torch.equal(covered != v, mask)
    assert covered[mask].std() == pytest.approx(1, abs=0.2)


# --- intensities ---


def test_intensities_of_the_networks():
    g = golden("iter_mask2/normalise")
    image = (g["volume"] / g["upper"]).clamp(0, 1)
    torch.testing.assert_close(to_network(image).float(), g["from_unit"], atol=1e-5, rtol=0)


def test_background_is_minus_three_for_both_networks():
    detector, image = toy(tau=0.0), slices(1, size=24)
    detector.detect(image)
    covered = detector.network.seen[0][:, :1]
    assert (covered[image == 0] == -3).all()


# --- thresholds ---


def test_first_mask_keeps_the_worst_60_percent_of_each_brain():
    g = golden("iter_mask2/thresholds")
    brain = g["brain"].bool()
    threshold = exceeded_by_share(g["first_error"], brain, 0.6)
    torch.testing.assert_close(threshold.flatten(), g["first_thr"], atol=0, rtol=0)
    mask = (g["first_error"] > threshold) & brain
    assert torch.equal(mask, g["first_mask"].bool())
    assert mask.flatten(1).sum(1).tolist() == np.ceil(0.6 * brain.flatten(1).sum(1).numpy()).tolist()


def test_padding_does_not_change_the_first_threshold():
    g = golden("iter_mask2/thresholds")
    padded = [F.pad(x, (8, 40, 0, 24)) for x in (g["first_error"], g["brain"].bool())]
    torch.testing.assert_close(exceeded_by_share(*padded, 0.6).flatten(), g["first_thr"], atol=0, rtol=0)


@pytest.mark.parametrize(("percentile", "key"), [(80.0, "tau_hard_20"), (70.0, "tau_hard_30")])
def test_healthy_threshold(percentile, key):
    g = golden("iter_mask2/thresholds")
    errors = g["val_loss"][g["mask_hard"].bool()]
    tau = healthy_threshold(errors, percentile)
    assert tau == g[key].item()
    assert (errors > tau).sum() == np.ceil((100 - percentile) / 100 * len(errors))


def test_healthy_threshold_of_few_errors():
    assert healthy_threshold(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), 80.0) == 4
    assert healthy_threshold(torch.tensor([3.0]), 80.0) == 0  # it exceeds it


def test_fitted_threshold_is_exceeded_by_the_stated_share_of_covered_pixels_in_any_batches():
    detector, image = tiny(tau_percentile=70.0), slices(8)
    detector.fit_threshold(image.split(3))
    fitted = detector.threshold.clone()
    detector.fit_threshold([image])
    torch.testing.assert_close(detector.threshold, fitted, rtol=1e-4, atol=0)
    v, drawn = to_network(image), generators(*range(8))
    mask = detector.random_masks(foreground_of(image), drawn)
    with torch.no_grad():
        error = (v - detector.rebuild(v, mask, detector.condition(v), drawn)).square()[mask]
    assert (error > detector.threshold.float()).float().mean() == pytest.approx(0.3, abs=2 / len(error))
    other = tiny()
    other.load_state_dict(detector.state_dict())
    assert other.threshold == detector.threshold > 0
    assert detector.threshold.dtype == torch.float64  # weights files keep it in full precision


@pytest.mark.parametrize("batches", [[], [torch.zeros(2, 1, 16, 16)]])
def test_threshold_of_no_healthy_pixel_is_refused(batches):
    detector = tiny()
    with pytest.raises(BundleError, match=r"fit_threshold: the slices are empty; calibrate on images of healthy"):
        detector.fit_threshold(batches)
    assert detector.threshold == 2


# --- refinement ---


@pytest.fixture(scope="module")
def loop():
    return golden("iter_mask2/loop")


@pytest.mark.parametrize("index", range(5))
def test_refinement_goes_the_published_way(loop, index, monkeypatch):
    noise = iter(loop["noise"][:, index : index + 1])
    monkeypatch.setattr(iter_mask2, "noise_like", lambda *_: next(noise))
    detector, one = toy(float(loop["tau"])), slice(index, index + 1)
    v, brain = loop["x"][one], loop["brain"][one].bool()
    torch.testing.assert_close(detector.condition(v), loop["cond"][one], atol=1e-5, rtol=0)
    refined = detector.refine(v, brain, generators(0)[0])
    rounds = int(loop["iterations"][index])
    assert [len(detector.first.seen), len(detector.network.seen), len(refined.masks)] == [1, rounds, 1 + rounds]
    for number in range(rounds):
        assert torch.equal(refined.masks[number + 1], loop["masks"][number, one].bool())
    assert torch.equal(refined.masks[-1], loop["final_mask"][one].bool())
    prediction = refined.prediction * brain.any()  # published: 0 where no brain is
    torch.testing.assert_close(prediction, loop["final_reconstruction"][one], atol=1e-5, rtol=0)
    error = (v - refined.prediction).square() * brain
    torch.testing.assert_close(error, loop["error_map"][one], atol=1e-5, rtol=1e-5)


def test_map_is_of_the_whole_brain_and_of_the_last_prediction():
    detector, image = toy(), slices(2, size=24)
    detection = detector.detect(image)
    v, foreground, drawn = to_network(image), foreground_of(image), generators(0, 0)
    refined = [detector.refine(v[i : i + 1], foreground[i : i + 1], drawn[i]) for i in range(2)]
    prediction = torch.cat([r.prediction for r in refined])
    torch.testing.assert_close(detection.anomaly_map, (v - prediction).square() * foreground)
    torch.testing.assert_close(detection.reconstruction, ((prediction + 3) / 6).clamp(0, 1) * foreground)
    outside_of_the_mask = foreground & ~torch.cat([r.masks[-1] for r in refined])
    assert detection.anomaly_map[outside_of_the_mask].min() > 0


def test_masks_only_shrink():
    detector, image = tiny(), slices(8)
    found = set()
    for v, generator in zip(to_network(image).split(1), generators(*range(8)), strict=True):
        with torch.no_grad():
            masks = detector.refine(v, v > -3, generator).masks
        sizes = [int(mask.sum()) for mask in masks]
        assert all(not (inner & ~outer).any() for outer, inner in pairwise(masks))
        assert all(small <= 0.99 * large for large, small in pairwise(sizes))
        assert sizes[1] == np.ceil(0.6 * sizes[0])
        found.add(len(masks))
    assert max(found) > 2
    assert len(found) > 1  # each slice stops by itself


@pytest.mark.parametrize(("tau", "calls", "covered"), [(0.0, 1, 346), (1e6, 2, 0)])
def test_thresholds_that_keep_all_and_none(tau, calls, covered):
    detector, image = toy(tau), torch.rand(1, 1, 24, 24) * 0.9 + 0.1
    refined = detector.refine(to_network(image), foreground_of(image), generators(0)[0])
    assert len(detector.network.seen) == calls
    assert refined.masks[-1].sum() == covered  # 60 % of 576
    if not covered:
        assert torch.equal(detector.network.seen[-1][:, :1], to_network(image))  # nothing left to cover


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_rounds_are_limited(loop, monkeypatch, rounds):
    noise = iter(loop["noise"][:, 2:3])
    monkeypatch.setattr(iter_mask2, "noise_like", lambda *_: next(noise))
    detector = toy(float(loop["tau"]), max_rounds=rounds)  # of the 6 that this slice takes
    v, brain = loop["x"][2:3], loop["brain"][2:3].bool()
    refined = detector.refine(v, brain, generators(0)[0])
    assert (len(detector.first.seen), len(detector.network.seen), len(refined.masks)) == (1, rounds, rounds + 1)
    assert torch.equal(refined.masks[-1], loop["masks"][rounds - 1, 2:3].bool() if rounds else brain)
    seen = [detector.first, detector.network][rounds > 0]
    assert torch.equal(refined.prediction, seen.formula(seen.seen[-1]))


def test_slice_without_foreground_is_healthy_and_calls_the_first_network_only():
    detector = toy()
    detection = detector.detect(torch.zeros(2, 1, 24, 24))
    assert not detection.anomaly_map.any()
    assert not detection.reconstruction.any()
    assert (len(detector.first.seen), len(detector.network.seen)) == (2, 0)


def test_two_pixels_keep_the_prediction_of_the_first_network():
    detector, image = toy(), torch.zeros(1, 1, 24, 24)
    image[..., 5, 5:7] = 0.5
    detection = detector.detect(image)
    v = to_network(image)
    expected = (v - detector.first(detector.condition(v))).square() * (image > 0)
    torch.testing.assert_close(detection.anomaly_map, expected)
    assert not detector.network.seen


def test_lesion_without_edges_of_its_own_is_found():
    """Networks that know the healthy slice give it back where noise covers the lesion."""
    healthy = torch.zeros(1, 1, 96, 96)
    healthy[..., ellipse()] = 0.5
    offset = torch.arange(96) - 40.0
    ill = healthy + 0.3 * torch.exp(-(offset[:, None] ** 2 + offset**2) / 100) * (healthy > 0)
    first = Counted(lambda _: to_network(healthy))
    second = Counted(lambda _: to_network(healthy), in_channels=2)
    detector = IterMask2(first, second)
    detector.threshold.fill_(0.1)
    refined = detector.refine(to_network(ill), foreground_of(ill), generators(0)[0])
    assert torch.equal(refined.masks[-1], (6 * (ill - healthy)).square() > 0.1)
    torch.testing.assert_close(detector.detect(ill).anomaly_map, 36 * (ill - healthy).square())  # units of v


# --- the contract of a method ---


@pytest.mark.parametrize("channels", [1, 2])
def test_detection(check_detection, channels):
    check_detection(tiny(channels), slices(channels=channels))


def test_slice_gives_the_same_alone_and_in_any_batch(check_batches):
    check_batches(tiny(), slices())


def test_not_a_bit_depends_on_the_batch():
    """Masks come from hard thresholds: a last digit that depends on the batch could change a whole map."""
    detector, image = tiny(), slices(12, size=32)
    seeds = torch.arange(12)
    together = detector.detect(image, seeds=seeds)
    for index in range(12):
        alone = detector.detect(image[index : index + 1], seeds=seeds[index : index + 1])
        assert torch.equal(alone.anomaly_map[0], together.anomaly_map[index])


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(), slices(1))


@pytest.mark.parametrize("size", [15, 18])
def test_wrong_size_is_refused(size):
    with pytest.raises(ImageShapeError, match="multiples of 4"):
        tiny().detect(torch.rand(1, 1, size, 16))


def test_smallest_allowed_size_works():
    detector = tiny()
    side = detector.size_divisor
    assert detector.detect(torch.rand(1, 1, side, side)).anomaly_map.shape == (1, 1, side, side)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": -1.0}, "radius = -1.0; choose one from 0 to 8.0, half the canvas"),
        ({"radius": 9.0}, "radius = 9.0; choose one from 0 to 8.0, half the canvas"),
        ({"low_amplitude": -0.5}, "low_amplitude = -0.5; choose 0 or more"),
        ({"square_px": 0}, "square_px = 0; choose 1 or more"),
        ({"first_share": 0.0}, "first_share = 0.0; choose one between 0 and 1"),
        ({"first_share": 1.0}, "first_share = 1.0; choose one between 0 and 1"),
        ({"min_shrink": 0.0}, "min_shrink = 0.0; choose one between 0 and 1"),
        ({"tau_percentile": 100.0}, "tau_percentile = 100.0; choose one between 0 and 100"),
        ({"max_rounds": -1}, "max_rounds = -1; choose 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingError) as raised:
        tiny(**settings)
    assert str(raised.value) == f"IterMask2: {message}"


# --- training ---


@pytest.mark.parametrize(("channels", "found"), [((1, 1, 1), "(1, 1, 1)"), ((1, 2, 2), "(1, 2, 2)")])
def test_networks_that_do_not_fit_each_other_are_not_trained(channels, found):
    first, takes, gives = channels
    networks = WeightStandardisedUNet(first, (4, 8), (2, 2)), WeightStandardisedUNet(takes, (4, 8), (2, 2), gives)
    with pytest.raises(SettingError) as raised:
        IterMask2Objective(IterMask2(*networks))
    assert str(raised.value).endswith(f"are {found}; choose (1, 2, 1)")


def test_squares_and_what_they_cover():
    g = golden("iter_mask2/random_mask")
    covered = torch.zeros(60, 60, dtype=torch.bool)
    for side in (4, 8, 16):
        of_side = g["side"] == side
        covered |= squares((60, 60), g["rows"][of_side], g["cols"][of_side], side)
    inside = g["brain"].bool()
    assert torch.equal(covered & inside, (g["keep60"] == 0) & inside)


def test_squares_are_cut_at_the_border():
    found = squares((6, 5), torch.tensor([4]), torch.tensor([3]), 4)
    assert found.nonzero().tolist() == [[4, 3], [4, 4], [5, 3], [5, 4]]


def test_covered_input(monkeypatch):
    g = {name: array[None, None] for name, array in golden("iter_mask2/random_mask").items()}
    detector = toy()
    monkeypatch.setattr(iter_mask2, "noise_like", lambda *_: g["noise"])
    detector.rebuild(g["x"], g["mask_hard"].bool(), g["x"], generators(0))
    assert torch.equal(detector.network.seen[0][:, :1], g["corrupted_hard"])


def test_random_masks_cover_the_published_share():
    inside, generator = ellipse(), generators(0)[0]
    shares = torch.tensor([float(random_mask(inside, 2, generator).sum() / inside.sum()) for _ in range(300)])
    assert shares.mean().item() == pytest.approx(0.18, abs=0.03)
    low, high = shares.quantile(torch.tensor([0.05, 0.95])).tolist()
    assert low == pytest.approx(0.03, abs=0.015)
    assert high == pytest.approx(0.42, abs=0.06)


def test_random_masks_stay_in_the_foreground_and_differ():
    detector, inside = tiny(), torch.rand(3, 1, 16, 16) > 0.3
    inside[1] = False
    first, again = (detector.random_masks(inside, generators(1, 2, 3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not (first & ~inside).any()
    assert [bool(mask.any()) for mask in first] == [True, False, True]
    assert not torch.equal(first, detector.random_masks(inside, generators(4, 5, 6)))


def test_loss_is_the_error_of_all_pixels_of_both_networks():
    detector, image = toy(), slices(2, size=24)
    foreground = foreground_of(image)
    foreground[..., :12, :] = False
    losses = IterMask2Objective(detector)(image, foreground)
    v, (shown,), (seen,) = to_network(image), detector.first.seen, detector.network.seen
    first, masked = (
        (v - network.formula(x)).square().mean() for network, x in ((detector.first, shown), (detector.network, seen))
    )
    torch.testing.assert_close(losses["first"], first)
    torch.testing.assert_close(losses["masked"], masked)
    torch.testing.assert_close(losses["loss"], first + masked)
    covered = seen[:, :1] != v
    assert covered.flatten(1).any(1).all()
    assert not (covered & ~foreground).any()
    assert torch.equal(shown, seen[:, 1:])


def test_masks_and_noise_of_a_training_are_new_each_time():
    detector, image = toy(), slices(2, size=24)
    objective = IterMask2Objective(detector)
    torch.manual_seed(0)
    objective(image)
    objective(image)
    torch.manual_seed(0)
    objective(image)
    first, second, repeated = detector.network.seen
    assert torch.equal(first, repeated)
    assert not torch.equal(first, second)


def test_averaged_networks_are_what_was_trained():
    """Group norm: no running statistics that an average could miss, and the same function in training and detection."""
    detector = tiny()
    objective = IterMask2Objective(detector)
    average = ExponentialMovingAverage(objective, decay=0.5)
    for _ in range(30):
        average.update_parameters(objective)
    assert [name for name, _ in detector.named_buffers()] == ["threshold"]
    image = slices(4)
    x = torch.cat([image, detector.condition(image)], dim=1)
    networks = (average.module.detector.network, detector.network.train(), detector.network.eval())
    for network in networks:
        torch.testing.assert_close(network(x), detector.network.eval()(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(detector.network.train()(x)[2:3], detector.network(x[2:3]), atol=1e-4, rtol=1e-4)


def test_training_teaches_both_networks(check_training):
    detector = IterMask2(
        WeightStandardisedUNet(1, (8, 16), (2, 4)), WeightStandardisedUNet(2, (8, 16), (2, 4), out_channels=1), 2.0, 16
    )
    objective, image = IterMask2Objective(detector), slices(4)
    check_training(objective, image, below=0.5, steps=40, parts=("first", "masked"))
