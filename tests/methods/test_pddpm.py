"""pDDPM against its reference program (golden/pddpm/README.md), and the contract of a method."""

import json
import re

import numpy as np
import pytest
import torch
from arrays import GOLDEN, golden, slices
from monai.networks.nets import DiffusionModelUNet
from scipy import ndimage
from stubs import Stub
from torch import nn

from common.errors import ImageShapeError, SettingError
from common.methods.pddpm import PDDPM, PDDPMObjective, eroded, inside_box, patch_grid

GRIDS = json.loads((GOLDEN / "pddpm/grids.json").read_text(encoding="utf-8"))
PAPER_UNET = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (128, 256, 256),
    "attention_levels": (False, False, False),
    "num_res_blocks": 3,
    "num_head_channels": 64,
    "resblock_updown": True,
}


def tiny(channels=1, **settings):
    torch.manual_seed(0)
    network = DiffusionModelUNet(2, channels, channels, 1, (8, 16), (False, False), norm_num_groups=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return PDDPM(network, **{"patch_size": 8, "erosion": 0, "median_size": 1, **settings}).eval()


# --- against the reference ---


def test_schedule():
    g, alpha_bar = golden("pddpm/cosine_schedule"), PDDPM(Stub()).alpha_bar
    torch.testing.assert_close(alpha_bar, g["alphas_cumprod_fp64"], rtol=1e-12, atol=0)
    assert alpha_bar[499].item() == pytest.approx(0.49384359, abs=1e-8)


@pytest.mark.parametrize("name", [name for name in GRIDS if "_overlap" in name])
def test_grid(name):
    height, width, patch_size = map(int, re.findall(r"\d+", name))
    expected = GRIDS[name]
    if isinstance(expected, str):  # one patch with overlap, where the reference divides by zero
        expected = [[0, 0, width, height]]
    # the reference's boxes may reach beyond the image, where the indexing of arrays cuts them
    expected = [(x0, y0, min(x1, width), min(y1, height)) for x0, y0, x1, y1 in expected]
    assert patch_grid((height, width), patch_size, name.endswith("True")) == expected


def test_training_loss():
    g = golden("pddpm/train_loss")
    x0 = g["x01"] * 2 - 1
    mask = torch.stack([inside_box(tuple(box), x0) for box in g["boxes_xyxy"].tolist()])
    detector = PDDPM(Stub())
    loss = PDDPMObjective(detector).patch_loss(x0, g["noise"], mask, g["t"])
    torch.testing.assert_close(loss, g["loss"])
    torch.testing.assert_close(detector.unet.calls[0][0], g["network_input"])
    torch.testing.assert_close(detector.unet(*detector.unet.calls[0]), g["network_output"])


@pytest.mark.parametrize("patch_size", [4])
def test_assembly_of_four_patches(patch_size):
    g, stub = golden("pddpm/test_assembly"), Stub()
    result = (PDDPM(stub, patch_size).reconstruct(g["slices01"] * 2 - 1, g["noise"]) + 1) / 2
    torch.testing.assert_close(result, g["assembled"])
    torch.testing.assert_close((g["slices01"] - result).abs(), g["residual"])
    assert len(stub.calls) == 1
    x, t = stub.calls[0]
    assert x.shape == (8, 1, 8, 8)
    assert t.tolist() == [499] * 8
    same = x.view(2, 4, 1, 8, 8) == (g["slices01"] * 2 - 1)[:, None]
    assert [int((~s).sum()) for s in same.flatten(0, 1)] == [patch_size**2] * 8  # all but the patch is clean


def test_assembly_of_overlapping_patches():
    slices01, noise = (golden("pddpm/test_assembly")[key] for key in ("slices01", "noise"))
    g = golden("pddpm/test_assembly_overlap5")
    result = (PDDPM(Stub(), 5, overlap=True).reconstruct(slices01 * 2 - 1, noise) + 1) / 2
    assert g["count"].max() == 4
    torch.testing.assert_close(result, g["assembled_avg_correct"])


def test_overlapping_patches_are_averaged():
    number = Stub(lambda x, t: torch.arange(float(len(x))).view(-1, 1, 1, 1).expand_as(x))
    x0 = torch.zeros(2, 1, 8, 8)
    result = PDDPM(number, 5, overlap=True).reconstruct(x0, x0)  # patches at 0 ... 4 and 3 ... 7 of each axis
    for index, expected in (((0, 0), 0), ((0, 3), 0.5), ((0, 7), 1), ((4, 0), 1), ((7, 4), 2.5), ((3, 4), 1.5)):
        assert result[:, 0, *index].tolist() == [expected, expected + 4]


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_erosion_is_that_of_scipy(iterations):
    mask = torch.rand(2, 1, 20, 24, generator=torch.Generator().manual_seed(0)) > 0.05
    expected = [ndimage.binary_erosion(m[0], iterations=iterations) if iterations else m[0].numpy() for m in mask]
    assert np.array_equal(eroded(mask, iterations)[:, 0].numpy(), np.stack(expected))
    assert iterations == 3 or expected[0].any()


# --- the contract ---


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"patch_size": 6, "overlap": True}, {"erosion": 1, "median_size": 3}])
def test_detection(check_detection, channels, settings):
    check_detection(tiny(channels, **settings), slices(channels=channels))


@pytest.mark.parametrize("settings", [{}, {"patch_size": 6, "overlap": True}])
def test_slice_gives_the_same_alone_and_in_any_batch(check_batches, settings):
    check_batches(tiny(**settings), slices())


def test_result_depends_on_the_seed_alone(check_seeds):
    check_seeds(tiny(), slices(1))


def test_perfect_prediction_finds_nothing():
    image = slices()
    stub = Stub(lambda x, t: (image * 2 - 1).repeat_interleave(4, dim=0))
    detection = PDDPM(stub, patch_size=8).detect(image)
    assert detection.anomaly_map.max() < 1e-6
    torch.testing.assert_close(detection.reconstruction, image)


def test_rim_is_left_out():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 4:12, 4:12] = 0.5
    detection = PDDPM(Stub(lambda x, t: torch.full_like(x, -1.0)), 16, erosion=2, median_size=1).detect(image)
    expected = torch.zeros(1, 1, 16, 16)
    expected[..., 6:10, 6:10] = 0.5
    assert torch.equal(detection.anomaly_map, expected)


@pytest.mark.parametrize(("overlap", "divisor"), [(False, 48), (True, 2)])
def test_patch_that_does_not_tile_is_refused_without_overlap(overlap, divisor):
    detector = tiny(patch_size=48, overlap=overlap)
    assert detector.size_divisor == divisor
    if overlap:
        assert detector.detect(torch.rand(1, 1, 64, 40)).anomaly_map.shape == (1, 1, 64, 40)
    else:
        with pytest.raises(ImageShapeError, match="multiples of 48"):
            detector.detect(torch.rand(1, 1, 64, 48))


def test_divisor_is_a_multiple_of_patch_and_network():
    assert tiny(patch_size=9).size_divisor == 18


@pytest.mark.parametrize("settings", [{"t": 1000}, {"t": -1}, {"patch_size": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError, match="choose"):
        PDDPM(Stub(), **settings)


# --- the training objective ---


@pytest.mark.parametrize("fixed_grid", [True, False])
def test_one_patch_of_each_slice_is_noised(fixed_grid):
    stub, image = Stub(), torch.full((64, 1, 16, 16), 0.5)
    torch.manual_seed(0)
    PDDPMObjective(PDDPM(stub, patch_size=8), fixed_grid=fixed_grid)(image)
    x, t = stub.calls[0]
    noised = (x != 0)[:, 0]  # 0.5 is 0 for the network; simplex noise is 0 at the first pixel
    boxes = set()
    for mask in noised:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        boxes.add((columns.min().item() // 2 * 2, rows.min().item() // 2 * 2))
        assert 7 <= columns.max() - columns.min() + 1 <= 8
        assert mask.sum() >= 56
    assert boxes == {(0, 0), (8, 0), (0, 8), (8, 8)} if fixed_grid else len(boxes) > 10
    assert t.min() < 100
    assert t.max() > 900


def test_gradient_comes_from_the_patch_alone():
    objective = PDDPMObjective(PDDPM(Stub(lambda x, t: output)))
    output = torch.zeros(1, 1, 8, 8, requires_grad=True)
    mask = inside_box((2, 3, 5, 7), output)[None]
    objective.patch_loss(torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), mask, torch.tensor([499])).backward()
    torch.testing.assert_close(output.grad, -mask / 64)  # the mean is over all pixels


def test_training_learns(check_training):
    torch.manual_seed(0)
    detector, image = tiny(), slices(4)
    objective = PDDPMObjective(detector)
    check_training(objective, image, image > 0, below=0.8)


def test_parameters_of_the_paper():
    with torch.device("meta"):
        network = DiffusionModelUNet(**PAPER_UNET)
    assert sum(p.numel() for p in network.parameters()) == 34_493_313
    assert PDDPM(network).size_divisor == 48
