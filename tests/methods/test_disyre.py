import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.diffusion.corruption import Corruption
from common.errors import ImageShapeError, SettingError
from common.methods.disyre import DISYRE, DISYREObjective, severity_table, trailing_steps
from common.networks.pixel_unshuffle_unet import PixelUnshuffleUNet
from tests.arrays import golden, slices

SETTINGS = {
    "channels": [8, 16],
    "attention_levels": [False, False],
    "num_res_blocks": 1,
    "num_head_channels": [0, 8],
    "norm_num_groups": 4,
}


class Toy(nn.Module):
    """P(x, s) = (1 - 0.6 s) x + 0.6 s (0.5 mean3x3(x) + 0.2), as a change of x; remembers what it is asked."""

    block_out_channels = (1,)

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, index):
        self.asked.append(index.tolist())
        share = 0.6 * golden("disyre/schedule")["severity"].to(x)[index].view(-1, 1, 1, 1)
        return share * (0.5 * F.avg_pool2d(x, 3, stride=1, padding=1) + 0.2 - x)


def tiny(**settings):
    torch.manual_seed(0)
    return DISYRE(PixelUnshuffleUNet(1, 2, **SETTINGS), **settings).eval()


def trained_like(**settings):
    detector = tiny(**settings)
    torch.manual_seed(1)
    nn.init.normal_(detector.unet.out[-1].conv.weight, std=0.3)
    return detector


# --- severities ---


def test_one_table_rises():
    table = golden("disyre/schedule")
    torch.testing.assert_close(severity_table(), table["severity"].float(), atol=1e-6, rtol=0)
    assert (severity_table().diff() > 0).all()


@pytest.mark.parametrize("number", [4, 5, 10, 20])
def test_steps(number):
    assert trailing_steps(number) == golden("disyre/schedule")[f"steps{number}"].tolist()


def test_index_of_a_severity_is_that_of_the_same_table():
    table, detector = golden("disyre/schedule"), DISYRE(Toy())
    assert detector.index(table["query_severity"].float()).tolist() == table["index_normative"].tolist()
    assert detector.index(table["query_severity"].float()).tolist() != table["CODE_index_training"].tolist()


def test_what_is_asked_in_detection_is_what_was_learned_in_training():
    """A slice of a severity of detection is learned under the index that detection asks with."""
    detector = DISYRE(Toy(), num_steps=5)
    asked = [detector.severity[step] for step in detector.steps]
    np.testing.assert_allclose(asked, golden("disyre/schedule")["severity_at_steps5"], atol=1e-6)
    image = slices(size=8)[:1]
    objective = DISYREObjective(detector, Corruption())
    foreground = image > 0
    for severity in asked:
        objective.restoration_loss(image, severity.view(1), image, foreground)
    in_training, detector.unet.asked = detector.unet.asked, []
    detector.detect(image)
    assert detector.unet.asked == in_training == [[99], [79], [59], [39], [19]]


def test_clean_slices_have_index_0():
    assert DISYRE(Toy()).index(torch.tensor([0.0, 0.003])).tolist() == [0, 0]


@pytest.mark.parametrize("number", [0, 101, -1])
def test_number_of_steps_outside_of_the_table(number):
    with pytest.raises(SettingError, match="1 to 100"):
        DISYRE(Toy(), num_steps=number)


# --- detection ---


@pytest.fixture(scope="module")
def g():
    return {key: value.float() for key, value in golden("disyre/restoration").items()}


def test_mean_of_single_steps(g):
    detector = DISYRE(Toy(), num_steps=5)
    detection = detector.detect(g["x"])
    torch.testing.assert_close(detection.anomaly_map, g["score_single_step_mean"], atol=1e-5, rtol=0)
    expected = g["x0_pred_single"].mean(dim=0).clamp(0, 1) * (g["x"] > 0)
    torch.testing.assert_close(detection.reconstruction, expected, atol=1e-5, rtol=0)
    assert detector.unet.asked == [[step, step] for step in (99, 79, 59, 39, 19)]
    weighted = detection.anomaly_map * g["foreground_share"].view(-1, 1, 1, 1)
    torch.testing.assert_close(weighted, g["score_single_step_weighted"], atol=1e-5, rtol=0)


def test_several_steps(g):
    detector = DISYRE(Toy(), num_steps=5, multi_step=True)
    for k, (index, following) in enumerate(zip(detector.steps, [*detector.steps[1:], None], strict=True)):
        x = g["x_walk"][k]
        restored = detector.restored(x, torch.full((len(x),), index))
        torch.testing.assert_close(restored, g["x0_pred_multi"][k], atol=1e-5, rtol=0)
        torch.testing.assert_close(detector.step(x, restored, index, following), g["x_walk"][k + 1], atol=1e-5, rtol=0)
    asked = detector.severity[detector.steps]
    torch.testing.assert_close(asked[1:] / asked[:-1], g["cold_ratio"], atol=1e-5, rtol=0)


def test_score_of_several_steps(g):
    """With all of the slice in the foreground, as the reference restores its background too."""
    everywhere = torch.ones_like(g["x"], dtype=torch.bool)
    detector = DISYRE(Toy(), num_steps=5, multi_step=True)
    detection = detector.detect(g["x"], everywhere)
    score = detection.anomaly_map * (g["x"] > 0)
    torch.testing.assert_close(score, g["score_multi_step"], atol=1e-5, rtol=0)
    torch.testing.assert_close(detection.reconstruction, g["x_walk"][-1], atol=1e-5, rtol=0)
    assert len(detector.unet.asked) == 5


@pytest.mark.parametrize("multi_step", [True, False])
def test_background_is_not_restored(multi_step):
    """What the network says of the background, which it never learned, does not reach the foreground."""
    seen = []

    class Bright(Toy):
        def forward(self, x, index):
            seen.append(x)
            return torch.where(x == 0, 1.0, 0.0)

    image = slices()
    detection = DISYRE(Bright(), multi_step=multi_step).detect(image)
    for x in seen:
        torch.testing.assert_close(x, image)
    assert detection.anomaly_map.max() < 1e-6


def test_starts_as_the_identity():
    detection = tiny().detect(slices())
    assert (detection.anomaly_map == 0).all()
    torch.testing.assert_close(detection.reconstruction, slices())


@pytest.mark.parametrize("settings", [{}, {"multi_step": True}, {"num_steps": 1, "median_size": 3}])
def test_detection(check_detection, settings):
    check_detection(trained_like(**settings), slices())


@pytest.mark.parametrize("multi_step", [True, False])
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, multi_step):
    check_batches(trained_like(multi_step=multi_step), slices())


def test_detection_draws_nothing():
    detector, state = trained_like(), torch.get_rng_state()
    first, second = (detector.detect(slices(), seeds=torch.tensor(seeds)) for seeds in ([1, 2, 3], [4, 5, 6]))
    assert torch.equal(first.anomaly_map, second.anomaly_map)
    assert torch.equal(torch.get_rng_state(), state)


def test_median_of_the_map():
    image = slices(size=32)
    plain, filtered = (trained_like(median_size=size).detect(image).anomaly_map for size in (1, 5))
    assert filtered.std() < plain.std()


def test_wrong_size_is_refused():
    with pytest.raises(ImageShapeError, match="multiples of 4"):
        tiny().detect(torch.rand(1, 1, 18, 18))


# --- training ---


def objective(loss="l2", **settings):
    return DISYREObjective(tiny(), Corruption(**settings), loss)


@pytest.mark.parametrize(("loss", "expected"), [("l1", 0.2), ("l2", 0.04), ("huber", 0.15)])
def test_loss_is_of_the_foreground(loss, expected):
    clean = slices()
    corrupted = torch.where(clean > 0, clean - 0.2, torch.tensor(7.0))
    foreground = clean > 0
    value = objective(loss).restoration_loss(corrupted, torch.ones(3), clean, foreground)
    assert value.item() == pytest.approx(expected * foreground.float().mean().item(), rel=1e-4)


def test_clean_slices_cost_nothing_at_the_start():
    assert objective(clean_share=1.0)(slices())["loss"] == 0
    torch.manual_seed(0)
    assert objective(clean_share=0.0, texture_amount=(0.9, 1.0))(slices(8, size=32))["loss"] > 0


def test_target_is_within_the_range_and_the_foreground():
    """Augmentation brightens slices beyond 1 and puts noise on the background: neither is a corruption."""
    image = slices()
    foreground = image > 0
    noisy = torch.where(foreground, image * 2, torch.tensor(0.3))
    assert objective(clean_share=1.0)(noisy, foreground)["loss"] == 0


def test_the_seed_decides_the_loss():
    values = []
    for seed in (1, 1, 2):
        made = objective()
        torch.manual_seed(seed)
        values.append(made(slices(8, size=32))["loss"].item())
    assert values[0] == values[1] != values[2]


def test_training_restores_the_corrupted_and_leaves_the_clean():
    image = 0.7 * F.pad(torch.ones(8, 1, 16, 16), (4, 4, 4, 4))
    foreground = image > 0
    corrupted = image.clone()
    corrupted[:4, :, 8:14, 8:14] = 0.3
    severity = 0.4 * (torch.arange(8) < 4)  # half of the slices are clean
    made = objective()
    optimizer = torch.optim.Adam(made.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        made.restoration_loss(corrupted, severity, image, foreground).backward()
        optimizer.step()
    error = (made.detector.restored(corrupted, made.detector.index(severity)) - image).abs() * foreground
    assert error[:4, :, 8:14, 8:14].mean() < 0.15
    assert error[4:].mean() < 0.03


def test_other_loss_is_refused():
    with pytest.raises(SettingError, match="choose one of l1, l2, huber"):
        objective("l3")
