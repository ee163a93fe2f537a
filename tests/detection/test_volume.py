import copy

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from common.detection.mahalanobis import mahalanobis_map
from common.detection.method import AnomalyDetector, noise_like
from common.detection.volume import VolumeDetector, smoothed_within, volume_mean
from common.errors import BundleError, SettingError
from common.weights import load_weights, save_weights

PREPARATION = {"spacing_mm": 2.0, "upper": 0.8, "percentile": 98.0}


class Toy(AnomalyDetector):
    """A map with noise and a trace of the position in the slice, and half the image as reconstruction."""

    size_divisor = 4

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("exact", torch.tensor(1 / 3, dtype=torch.float64))
        self.batches = []

    def _detect(self, image, foreground, generators):
        self.batches.append(image)
        row = torch.arange(image.shape[2]).view(-1, 1) * 10
        column = torch.arange(image.shape[3])
        anomaly_map = image.mean(1, keepdim=True) + noise_like(image, generators).abs().amax(1, keepdim=True)
        return anomaly_map + row + column, image / 2


def network(**settings):
    return VolumeDetector(Toy(), **settings).eval()


def volume(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1


@pytest.mark.parametrize("size", [(1, 1, 1), (8, 4, 3), (5, 7, 2), (2, 9, 1)])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_size(size, channels, axis):
    image = volume(2, channels, *size)
    result = network(axis=axis)(image)
    assert result.shape == (2, 1 + channels, *size)
    assert result.is_contiguous()
    assert (result[:, :1] > 0).all()
    torch.testing.assert_close(result[:, 1:], image / 2)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_taken_along_the_axis_and_laid_back(axis):
    image = volume(2, 1, 5, 6, 7)
    expected = network(axis=2)(image)
    moved = network(axis=axis)(image.movedim(4, axis + 2))
    torch.testing.assert_close(moved.movedim(axis + 2, 4), expected)
    rows = network(axis=axis).detector.detect(torch.full((1, 1, 8, 8), 0.5)).anomaly_map
    assert rows[0, 0, 5, 0] > rows[0, 0, 0, 5]  # the toy tells rows from columns


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_result_does_not_depend_on_the_batch_size(batch_size):
    image = volume(2, 1, 4, 4, 7)
    assert torch.equal(network(batch_size=batch_size)(image), network(batch_size=16)(image))


def test_volume_of_a_batch_gives_the_same_alone():
    image = volume(3, 1, 4, 4, 5)
    image[0, ..., :2] = 0
    together = network(batch_size=4)(image)
    for index in range(3):
        assert torch.equal(network(batch_size=4)(image[index : index + 1])[0], together[index])


def test_slices_without_foreground_are_left_out_and_zero():
    image = volume(1, 2, 4, 4, 6)
    image[..., [0, 3]] = 0
    image[:, 0, ..., 4] = 0  # one channel is enough
    model = network(batch_size=3)
    result = model(image)
    assert (result[..., [0, 3]] == 0).all()
    assert (result[:, 0][..., [1, 2, 4, 5]] > 0).all()
    assert [len(batch) for batch in model.detector.batches] == [3, 1]
    assert torch.equal(model.detector.batches[1][0], image[0, ..., 5])


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 5, 6)])
def test_empty_volume_is_zero(size):
    model = network()
    result = model(torch.zeros(2, 1, *size))
    assert result.shape == (2, 2, *size)
    assert (result == 0).all()
    assert model.detector.batches == []


def test_seed_and_index_of_the_slice_are_the_randomness():
    image = torch.full((1, 1, 4, 4, 3), 0.5)
    result = network(seed=1)(image)
    assert torch.equal(result, network(seed=1)(image))
    assert not torch.equal(result, network(seed=2)(image))
    assert not torch.equal(result[..., 0], result[..., 1])
    image[..., 0] = 0  # an empty slice before it does not change what a slice gives
    assert torch.equal(network(seed=1)(image)[..., 1:], result[..., 1:])


def test_padding_is_no_foreground():
    model = network()
    model(volume(1, 1, 5, 6, 1))
    padded = model.detector.batches[0]
    assert padded.shape == (1, 1, 8, 8)
    assert (padded[..., 5:, :] == 0).all()
    assert (padded[..., 6:] == 0).all()


# --- weights ---


def test_weights_file_gives_the_same_network(tmp_path):
    original, loaded = network(preparation=PREPARATION), network(preparation=PREPARATION)
    with torch.no_grad():
        original.detector.convolution.weight.fill_(1.00048828125)  # halfway between two half-precision numbers
    original.calibration.fit(0.123456789012345, 0.01, torch.rand(20))
    save_weights(original.state_dict(), tmp_path / "model.pt")
    stored = load_weights(tmp_path / "model.pt")
    assert stored["detector.convolution.weight"].dtype == torch.float16
    loaded.load_state_dict(stored)
    state, expected = loaded.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.dtype == expected[name].dtype
        exact = expected[name] if value.dtype != torch.float32 else expected[name].half().float()
        assert torch.equal(value, exact), name
    assert loaded.calibration.is_fitted
    assert loaded.calibration.threshold.item() == 0.123456789012345
    assert loaded.state_dict()["detector.exact"].item() == 1 / 3


@pytest.mark.parametrize(
    "other",
    [{**PREPARATION, "upper": 0.9}, {**PREPARATION, "canvas": 96}, {}, {**PREPARATION, "spacing_mm": 2.001}],
    ids=["value", "more", "none", "close"],
)
def test_weights_prepared_otherwise_are_refused(other):
    with pytest.raises(BundleError, match="trained with other settings"):
        network(preparation=other).load_state_dict(network(preparation=PREPARATION).state_dict())


def test_refusal_names_both_settings_and_holds_when_not_strict():
    state = network(preparation={"upper": 0.8}).state_dict()
    with pytest.raises(BundleError, match=r"\[0\.8\], than \[0\.9\] \(upper\)"):
        network(preparation={"upper": 0.9}).load_state_dict(state, strict=False)


def test_order_of_the_settings_does_not_matter():
    state = network(preparation=PREPARATION).state_dict()
    network(preparation=dict(reversed(PREPARATION.items()))).load_state_dict(state)


def test_preparation_missing_from_the_weights_is_refused():
    state = network(preparation=PREPARATION).state_dict()
    del state["preparation"]
    with pytest.raises(RuntimeError, match="preparation"):
        network(preparation=PREPARATION).load_state_dict(state)


def test_refused_weights_inside_another_module_and_in_a_copy():
    state = nn.ModuleDict({"inner": network(preparation={"upper": 0.8})}).state_dict()
    outer = nn.ModuleDict({"inner": network(preparation={"upper": 0.9})})
    for module in (outer, copy.deepcopy(outer)):
        with pytest.raises(BundleError, match="other settings"):
            module.load_state_dict(state)


def test_seeds_are_averaged():
    image = volume(1, 1, 4, 4, 3)
    single = [network(seed=seed)(image) for seed in (3, 4, 5)]
    torch.testing.assert_close(network(seed=3, num_seeds=3)(image), torch.stack(single).mean(0))
    assert not torch.equal(single[0], single[1])


@pytest.mark.parametrize("axis", [0, 2])
def test_mirror_images_are_averaged(axis):
    image = volume(1, 1, 4, 8, 4)
    side = 3 if axis == 0 else 2  # the first axis of a slice
    plain, other = network(axis=axis)(image), network(axis=axis)(image.flip(side)).flip(side)
    torch.testing.assert_close(network(axis=axis, mirror=True)(image), (plain + other) / 2)
    assert not torch.equal(plain, other)


def test_smoothing_is_the_mean_of_the_foreground_around():
    image = volume(1, 1, 8, 8, 9)
    image[..., :4, :] = 0
    image[..., 4] = 0
    plain, smooth = network()(image), network(smoothing_vox=1.5)(image)
    inside = image[0, 0] > 0
    gaussian = torch.exp(-0.5 * (torch.arange(9.0) / 1.5) ** 2)
    at = torch.tensor([4, 5, 7])
    distance = (torch.stack(torch.meshgrid(*map(torch.arange, inside.shape), indexing="ij"), -1) - at).abs()
    weight = gaussian[distance].prod(-1) * inside * (distance <= 4).all(-1)  # truncated at 3 sigma, 4.5 voxels
    expected = (plain[0, 0] * weight).sum() / weight.sum()
    assert smooth[0, 0, 4, 5, 7] == pytest.approx(float(expected), rel=2e-3)
    assert (smooth[0, 0][~inside] == 0).all()
    assert torch.equal(smooth[:, 1:], plain[:, 1:])
    constant = torch.ones(1, 1, 4, 4, 4)
    constant[..., 0] = 0
    torch.testing.assert_close(smoothed_within(3 * constant, constant > 0, 2.0), 3 * constant)


def test_smoothing_of_slices_that_are_no_neighbours_stays_in_each():
    image = volume(1, 1, 8, 8, 3)
    smooth = network(smoothing_vox=[1.5, 1.5, 0])(image)
    changed = image.clone()
    changed[..., 1] = image[..., 1].flip(2)
    other = network(smoothing_vox=[1.5, 1.5, 0])(changed)
    assert torch.equal(smooth[..., [0, 2]], other[..., [0, 2]]) and not torch.equal(smooth[..., 1], other[..., 1])
    plain = network()(image)[:, :1]
    alone = smoothed_within(plain[..., :1], image[..., :1] > 0, 1.5)
    torch.testing.assert_close(smooth[:, :1, ..., :1], alone)
    assert not torch.allclose(smooth[:, :1], plain)
    spread = smoothed_within(plain, image > 0, [0, 0, 1.5])
    torch.testing.assert_close(smoothed_within(plain, image > 0, [0, 0, 0]), plain)
    assert not torch.allclose(spread, plain)


@pytest.mark.parametrize("wrong", [{"num_seeds": 0}, {"smoothing_vox": -1.0}, {"smoothing_vox": [1.5, 0]}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        network(**wrong)


# --- the method's own scores of the slices ---


class Scored(Toy):
    """A score that comes with the map: of the slice, with a trace of the mirroring and of the seed."""

    def _detect(self, image, foreground, generators):
        return *super()._detect(image, foreground, generators), self.measured(image, generators)

    def measured(self, image, generators):
        rows = torch.arange(1.0, image.shape[2] + 1).view(-1, 1)
        return (image * rows).sum(dim=(1, 2, 3)) + torch.tensor([float(g.initial_seed() % 1009) for g in generators])


class Costly(Scored):
    """The same score, by passes of its own."""

    def _detect(self, image, foreground, generators):
        return Toy._detect(self, image, foreground, generators)

    def score(self, image, foreground, generators):
        assert torch.equal(foreground, (image > 0).any(dim=1, keepdim=True))
        return self.measured(image, generators)


def test_method_without_a_score_has_none():
    model = network()
    model(volume(1, 1, 4, 4, 3))
    assert model.slice_scores is None
    assert model.score(volume(1, 1, 4, 4, 3)) is None


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_lie_at_their_slices(axis, batch_size):
    image = volume(2, 2, 5, 6, 7)
    image.movedim(axis + 2, 0)[1] = 0  # a slice without foreground, of both volumes
    model = VolumeDetector(Scored(), axis=axis, batch_size=batch_size, seed=4)
    model(image)
    slices = image.movedim(axis + 2, 1)
    assert model.slice_scores.shape == slices.shape[:2]
    assert model.slice_scores.isnan().nonzero()[:, 1].tolist() == [1, 1]
    padded = nn.functional.pad(slices, (0, -slices.shape[4] % 4, 0, -slices.shape[3] % 4))
    for index in (0, 2, 4):
        seeds = torch.full((2,), 4 * 1_000_003 + index)
        torch.testing.assert_close(model.slice_scores[:, index], Scored().detect(padded[:, index], seeds=seeds).score)


@pytest.mark.parametrize("views", [{}, {"mirror": True}, {"num_seeds": 3, "mirror": True}])
def test_score_of_its_own_passes_is_that_of_the_same_views(views):
    """Same seeds and mirror images as the map; and the map is not touched by it."""
    image = volume(2, 1, 5, 6, 4)
    image[0, ..., 2] = 0
    free, costly = VolumeDetector(Scored(), seed=2, **views), VolumeDetector(Costly(), seed=2, **views)
    assert torch.equal(free(image), costly(image))
    assert costly.slice_scores is None
    assert free.score(image) is None
    assert torch.equal(costly.score(image).isnan(), free.slice_scores.isnan())
    torch.testing.assert_close(costly.score(image), free.slice_scores, equal_nan=True)
    single = VolumeDetector(Costly(), seed=2).score(image)
    assert torch.equal(single.nan_to_num(), free.slice_scores.nan_to_num()) is not bool(views)


@pytest.mark.parametrize("method", [Scored, Costly])
def test_scores_that_autocast_makes_short_are_laid_back(method, monkeypatch):
    image, measured = volume(1, 1, 4, 4, 3), Scored.measured
    monkeypatch.setattr(Scored, "measured", lambda *given: measured(*given).bfloat16())
    model = VolumeDetector(method())
    model(image)
    scores = model.slice_scores if method is Scored else model.score(image)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_scores_of_the_last_volume_do_not_stay():
    model = VolumeDetector(Scored())
    model(volume(1, 1, 4, 4, 3))
    model(torch.zeros(1, 1, 4, 4, 3))
    assert model.slice_scores is None
    assert VolumeDetector(Costly()).score(torch.zeros(1, 1, 4, 4, 3)) is None


def test_volume_of_images_with_meta_data():
    image = volume(1, 1, 4, 4, 3)
    for model, scores in ((Scored(), lambda m, x: m(x) is None or m.slice_scores), (Costly(), VolumeDetector.score)):
        plain, meta = (scores(VolumeDetector(model), x) for x in (image, MetaTensor(image)))
        assert torch.equal(plain, meta)


def test_score_of_a_volume_is_the_mean_over_the_slices_with_foreground():
    assert volume_mean(torch.tensor([torch.nan, 2.0, 7.0, torch.nan])) == 4.5
    assert volume_mean(torch.tensor([torch.nan])) is None
    assert volume_mean(None) is None


class Drawing(AnomalyDetector):
    """Reconstructs half the image, and noise; its map says nothing."""

    size_divisor = 4

    def _detect(self, image, foreground, generators):
        reconstruction = (image / 2 + 0.1 * noise_like(image, generators)).clamp(0, 1)
        return torch.full_like(image[:, :1], 7.0), reconstruction


@pytest.mark.parametrize("mirror", [False, True])
def test_several_reconstructions_can_be_combined_by_their_covariance(mirror):
    image = volume(1, 1, 6, 7, 3)
    image[:, :, 0] = 0
    one = {"mirror": mirror, "batch_size": 2}
    result = VolumeDetector(Drawing(), num_seeds=3, combine="mahalanobis", **one).eval()(image)
    draws = [VolumeDetector(Drawing(), seed=seed).eval()(image)[:, 1:] for seed in range(3)]
    if mirror:
        flipped = [VolumeDetector(Drawing(), seed=seed).eval()(image.flip(2))[:, 1:].flip(2) for seed in range(3)]
        draws = [draw for pair in zip(draws, flipped, strict=True) for draw in pair]
    torch.testing.assert_close(result[:, 1:], torch.stack(draws).mean(dim=0))
    for z in range(3):
        expected = mahalanobis_map(
            image[..., z], torch.stack([draw[..., z] for draw in draws]), image[..., z] > 0, 0.01
        )
        torch.testing.assert_close(result[:, :1, ..., z], expected, atol=1e-4, rtol=1e-4)
        assert not result[:, :1, 0, :, z].any()


def test_combined_by_their_covariance_the_batch_size_does_not_matter():
    image = volume(2, 2, 5, 6, 4)
    results = [
        VolumeDetector(Drawing(), num_seeds=2, combine="mahalanobis", batch_size=size).eval()(MetaTensor(image))
        for size in (1, 3, 16)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"num_seeds": 1}, {"num_seeds": 4, "regularisation": 0.0}])
def test_one_reconstruction_has_no_covariance(settings):
    with pytest.raises(SettingError, match="two seeds"):
        VolumeDetector(Drawing(), combine="mahalanobis", **settings)
