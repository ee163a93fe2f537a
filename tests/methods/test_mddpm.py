"""mDDPM against the golden arrays of its filters, rectangles and losses (golden/mddpm/README.md)."""

import pytest
import torch
from arrays import golden, slices
from stubs import Stub
from torch import nn

from common.errors import SettingError
from common.methods.mddpm import MDDPMObjective, contents, corners, largest_side, low_pass, sides
from common.methods.pddpm import PDDPM, PDDPMObjective, inside_box
from common.networks.pixel_unshuffle_unet import PixelUnshuffleUNet


def objective(stub=None, **settings):
    return MDDPMObjective(PDDPM(stub or Stub(), patch_size=4), **settings)


def brains(batch=4, size=48):
    """Slices with a background all around."""
    image = torch.zeros(batch, 1, size, size)
    image[..., 5:44, 6:39] = torch.rand(batch, 1, 39, 33, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    return image


# --- against the golden arrays ---


@pytest.mark.parametrize("half_width", [2, 5, 10])
def test_filters(half_width):
    g = golden("mddpm/frequency")
    image = g["image"][None]
    torch.testing.assert_close(low_pass(image, half_width)[0], g[f"low_v{half_width}"], atol=1e-5, rtol=0)
    high = contents(image, "high", half_width)[0]
    torch.testing.assert_close(high, g[f"high_v{half_width}"], atol=1e-5, rtol=0)
    assert high.min() < -0.01  # the network sees it as it comes
    assert not contents(image, "zero", half_width).any()


def test_places_and_sides():
    g = golden("mddpm/box_geometry")
    for i, length in enumerate(g["brain_rows"].tolist()):
        largest, place = largest_side(length), corners(length)
        assert largest == g["max_side"][i]
        assert sides(length, None)[0] == g["min_side"][i]
        assert (len(place) == 0) == bool(g["CODE_raises"][i])
        assert (place.start, place.stop - 1) == (g["corner_offset_low"][i], g["corner_offset_high"][i])


@pytest.mark.parametrize("kind", ["high", "low", "zero"])
def test_rectangles_of_a_slice(kind, monkeypatch):
    g = golden("mddpm/corruption")
    image, brain = g["image"][None, None], g["brain"][None, None]
    boxes = [(left, top, left + width, top + height) for top, left, height, width in g["boxes_row_col_height_width"]]
    corruption = objective(kinds=[kind])
    monkeypatch.setattr(corruption, "random_boxes", lambda brain: boxes)
    monkeypatch.setattr("common.methods.mddpm.HALF_WIDTHS", (5, 5))
    corrupted, replaced = corruption.corrupt(image, brain)
    expected = g["zero" if kind == "zero" else f"{kind}_v5"]
    torch.testing.assert_close(corrupted[0, 0], expected, atol=1e-5, rtol=0)
    assert torch.equal(replaced & (corrupted != image), corrupted != image)  # nothing else changes
    assert not (replaced & ~brain).any()


@pytest.mark.parametrize("name", ["corrupted", "clean"])
def test_losses(name):
    g, stub = golden("mddpm/train_loss"), Stub()
    images, given = g["x01"], g["corrupted01" if name == "corrupted" else "x01"]
    mask = torch.stack([inside_box(tuple(box), images) for box in g["boxes_x0y0x1y1"].tolist()])
    arguments = (images, given, given != images, g["noise"], mask, g["t_index"])
    loss = objective(stub).repair_loss(*arguments)
    torch.testing.assert_close(loss, g[f"{name}_loss_repair_region"], rtol=1e-5, atol=0)
    torch.testing.assert_close(stub.calls[0][0], g[f"{name}_network_input"])
    published = objective(inpaint=True).repair_loss(*arguments)
    torch.testing.assert_close(published, g[f"{name}_loss"], rtol=1e-5, atol=0)


# --- what is drawn ---


def test_rectangles_lie_inside_and_are_as_many_as_said():
    torch.manual_seed(0)
    brain = brains()[0, 0] > 0
    drawn = [objective().random_boxes(brain) for _ in range(200)]
    assert {len(boxes) for boxes in drawn} == set(range(6))
    assert {len(objective(counts=(2, 3)).random_boxes(brain)) for _ in range(50)} == {2, 3}
    for left, top, right, bottom in (box for boxes in drawn for box in boxes):
        assert 6 + 5 <= left < right <= 39 - 5
        assert 5 + 5 <= top < bottom <= 44 - 5
        assert 3 <= bottom - top <= 7  # of 39 rows
        assert 2 <= right - left <= 5  # of 33 columns: each axis has its own sides
    small = [objective(smallest_side=1, counts=(1, 1)).random_boxes(brain)[0] for _ in range(100)]
    assert {bottom - top for _, top, _, bottom in small} == set(range(1, 8))


@pytest.mark.parametrize("length", [0, 1, 12])
def test_small_and_empty_slices_stay_as_they_are(length):
    image = torch.zeros(1, 1, 48, 48)
    image[..., :length, :30] = 0.5
    corrupted, replaced = objective(counts=(5, 5)).corrupt(image, image > 0)
    assert torch.equal(corrupted, image)
    assert not replaced.any()


def test_each_slice_has_its_own_rectangles_kind_and_patch():
    torch.manual_seed(0)
    images = brains(64)
    corrupted, replaced = objective(kinds=("high", "zero"), counts=(1, 1)).corrupt(images, images > 0)
    assert len({tuple(mask.flatten().nonzero().flatten().tolist()) for mask in replaced}) > 60
    is_zero = [not corrupted[i][replaced[i]].any() for i in range(64)]
    assert 16 < sum(is_zero) < 48
    assert torch.equal(corrupted[~replaced], images[~replaced])


def test_network_sees_the_rectangles_and_not_what_was_there():
    torch.manual_seed(0)
    images, stub = brains(8), Stub(lambda x, t: torch.zeros_like(x))
    objective(stub, kinds=("zero",), counts=(5, 5))(images)
    x, _ = stub.calls[0]
    assert (((x == -1) & (images > 0)).flatten(1).sum(dim=1) > 20).all()


def test_gradient_comes_from_patch_and_rectangles_alone():
    output = torch.zeros(1, 1, 8, 8, requires_grad=True)
    mask, replaced = inside_box((0, 0, 4, 4), output)[None], torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    replaced[..., 2:6, 2:6] = True
    images, t = torch.ones(1, 1, 8, 8), torch.tensor([499])
    arguments = (images, images, replaced, torch.zeros_like(images), mask, t)
    gradient = {}
    for inpaint in (False, True):
        output.grad = None
        objective(Stub(lambda x, t: output), inpaint=inpaint).repair_loss(*arguments).backward()
        gradient[inpaint] = output.grad.clone()
    expected = ((mask == 1) | replaced).float()
    torch.testing.assert_close(gradient[False], -expected / expected.sum())
    torch.testing.assert_close(gradient[True], -mask / 64)  # the rectangles teach nothing, as in the published program


def test_without_rectangles_it_learns_what_pddpm_learns():
    """Its loss is the mean over the patch, pDDPM's the mean over all pixels, of which the patch is a quarter."""
    images, losses = slices(4, size=8), []
    for made in (objective(counts=(0, 0)), PDDPMObjective(PDDPM(Stub(), patch_size=4))):
        torch.manual_seed(5)
        noise, t = torch.randn_like(images), torch.tensor([3, 99, 499, 700])
        mask = inside_box((0, 0, 4, 4), images).expand(4, -1, -1, -1)
        nothing = torch.zeros_like(mask, dtype=torch.bool)
        if isinstance(made, MDDPMObjective):
            losses.append(made.repair_loss(images, images, nothing, noise, mask, t))
        else:
            losses.append(4 * made.patch_loss(images * 2 - 1, noise, mask, t))
    torch.testing.assert_close(*losses)


def test_training_learns(check_training):
    torch.manual_seed(0)
    network = PixelUnshuffleUNet(
        1, 2, channels=[8, 16], attention_levels=[False, False], num_res_blocks=1, norm_num_groups=4
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    training, images = MDDPMObjective(PDDPM(network, patch_size=24), max_timestep=600), brains(4)
    check_training(training, images, images > 0, below=0.8)


@pytest.mark.parametrize("settings", [{"kinds": ["mixed"]}, {"kinds": []}, {"counts": [3, 1]}, {"counts": [-1, 1]}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(SettingError, match=r"choose|give"):
        objective(**settings)
