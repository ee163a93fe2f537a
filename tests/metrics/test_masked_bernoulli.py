import numpy as np
import pytest
import torch
from arrays import GOLDEN

from common.metrics.masked_bernoulli import (
    auprc,
    dice,
    map_metrics,
    masked_bernoulli_metrics,
    psnr,
    relative_maps,
    remove_small,
    segment,
    squared_differences,
)

ROUNDING = 1e-7  # of the reference program, in float32


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "berdiff" / "postprocess.npz")


@pytest.fixture(scope="module")
def pair(golden):
    return golden["x"][None], golden["recon"][None]


def test_squared_differences_are_those_of_the_paper(golden, pair):
    assert np.array_equal(squared_differences(*pair).sum(1)[0], golden["paper_map"])


@pytest.mark.parametrize("branch", ["sum", "per-channel"])
def test_both_branches_match_the_reference_program(branch, golden, pair):
    name = f"{branch.replace('-', '_')}_branch"
    relative = relative_maps(squared_differences(*pair, branch), branch)
    assert np.array_equal(np.squeeze(relative), golden[f"{name}_map01"])
    assert np.array_equal((relative > 0.5).any(1)[0], golden[f"{name}_raw"] > 0)
    predicted = segment(relative)
    assert np.array_equal(predicted[0], golden[f"{name}_pred"] > 0)
    assert dice(predicted, golden["gt"][None] > 0)[0] == pytest.approx(golden[f"{name}_dice"], abs=ROUNDING)


def test_auprc_and_psnr_match_the_reference_program(golden, pair):
    relative = relative_maps(squared_differences(*pair))
    precision = auprc(relative[:, 0], golden["gt"][None] > 0)[0]
    assert precision == pytest.approx(golden["sum_branch_average_precision"], abs=1e-9)
    assert psnr(*pair)[0] == pytest.approx(golden["psnr"], abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"), [("code", "reference_out_filled_area_gt_15"), ("paper", "paper_out_area_ge_10")]
)
def test_component_rules_match(rule, expected):
    golden = np.load(GOLDEN / "berdiff" / "components.npz")
    assert np.array_equal(remove_small(golden["mask_in"] > 0, rule), golden[expected] > 0)


def test_hole_counts_in_the_code_and_is_not_filled():
    ring = np.zeros((12, 12), dtype=bool)
    ring[2:6, 2:6] = True
    ring[3:5, 3:5] = False  # 12 pixels, 16 with the hole
    assert np.array_equal(remove_small(ring, "code"), ring)
    ring[2, 2] = False  # 11 and 15
    assert not remove_small(ring, "code").any()
    assert np.array_equal(remove_small(ring, "paper"), ring)


def test_mean_and_population_std_are_over_slices_with_lesion(golden, pair):
    """One slice thrice: as it is, found worse, and without lesion, which does not count."""
    worse = pair[1][0] + np.float32(0.2) * np.random.default_rng(0).random(pair[1][0].shape, dtype=np.float32)
    image = torch.from_numpy(np.concatenate([pair[0]] * 3))
    reconstruction = torch.from_numpy(np.stack([pair[1][0], worse, np.zeros_like(worse)]))
    lesion = torch.from_numpy(np.stack([golden["gt"], golden["gt"], np.zeros_like(golden["gt"])]))
    result = masked_bernoulli_metrics(image, reconstruction, lesion)
    alone = [masked_bernoulli_metrics(image[[i]], reconstruction[[i]], lesion[[i]]) for i in (0, 1)]
    for name in ("dice", "auprc", "psnr"):
        a, b = (one[name]["mean"] for one in alone)
        assert result[name]["mean"] == pytest.approx((a + b) / 2)
        assert result[name]["std"] == pytest.approx(abs(a - b) / 2)
    assert result["psnr"]["std"] > 0.1
    assert alone[0]["dice"] == {"mean": pytest.approx(golden["sum_branch_dice"], abs=ROUNDING), "std": 0}


def test_per_channel_has_no_auprc(golden, pair):
    result = masked_bernoulli_metrics(*pair, golden["gt"][None], "per-channel")
    assert result.keys() == {"dice", "psnr"}
    assert result["dice"]["mean"] == pytest.approx(golden["per_channel_branch_dice"], abs=ROUNDING)


def test_threshold_is_relative_to_the_slice(golden, pair):
    """Why Dice is over slices with a lesion: the same positives whatever the scale of the map."""
    maps = squared_differences(*pair)
    assert np.array_equal(segment(relative_maps(maps / 1024)), segment(relative_maps(maps)))
    assert map_metrics(maps / 1024, golden["gt"][None]) == map_metrics(maps, golden["gt"][None])
    assert not segment(relative_maps(np.ones_like(maps))).any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 8, 8), (1, 1, 8, 8), (1, 8, 8)), "same shape"),
        (((1, 2, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8)), "lesion"),
        (((1, 2, 8, 8), (1, 2, 8, 8), (1, 8, 8)), "no slice has a lesion"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        masked_bernoulli_metrics(*(np.zeros(shape) for shape in shapes))
