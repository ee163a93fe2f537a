import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandAffined
from torch import nn
from torch.utils.data import DataLoader, Dataset

from common.networks.latent_space import LatentSpace
from common.workflows.slices import LatentDataset, SliceDataset, in_order, latents, middle_of, prepare_batch, shuffled

DEVICE = torch.device("cpu")


def volume(value, size=(4, 6, 5)):
    """Slice k along the last axis has 4 k foreground pixels of `value` + k / 100."""
    image = torch.zeros(1, *size)
    for k in range(size[2]):
        image[0, : min(k, size[0]), :4, k] = value + k / 100
    return image


def prepared(item):
    return {"image": MetaTensor(item["image"])}


def dataset(values=(0.25, 0.5), **settings):
    return SliceDataset([{"image": volume(v)} for v in values], prepared, **settings)


def test_slices_of_all_volumes_that_hold_foreground():
    slices = dataset()
    assert len(slices) == 2 * 4
    item = slices[5]
    assert item["image"].shape == (1, 4, 6)
    assert item["image"].dtype == torch.float32
    assert type(item["image"]) is torch.Tensor
    torch.testing.assert_close(item["image"], volume(0.5)[..., 2], atol=1e-3, rtol=0)
    assert item["foreground"].dtype == torch.bool
    assert torch.equal(item["foreground"], volume(0.5)[..., 2] > 0)


@pytest.mark.parametrize(("min_foreground", "expected"), [(1, 4), (4, 4), (5, 3), (16, 1), (17, 0)])
def test_slices_with_little_foreground_are_left_out(min_foreground, expected):
    assert len(dataset((0.5,), min_foreground=min_foreground)) == expected


@pytest.mark.parametrize(("axis", "count", "shape"), [(0, 4, (6, 5)), (1, 4, (4, 5)), (2, 4, (4, 6))])
def test_axis(axis, count, shape):
    slices = dataset((0.5,), axis=axis)
    assert len(slices) == count
    assert slices[0]["image"].shape[1:] == shape
    expected = volume(0.5).select(axis + 1, 2 if axis == 2 else 1)  # the first slice of the last axis is empty
    torch.testing.assert_close(slices[1]["image"], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("count", "left"), [(None, 5), (9, 5), (3, 3), (2, 2), (1, 1)])
def test_middle_slices_are_those_in_the_middle(count, left):
    slices = torch.arange(5.0)
    kept = middle_of(slices, count)
    assert len(kept) == left
    assert abs(float(kept.mean()) - 2) <= 0.5
    assert torch.equal(kept, slices[int(kept[0]) : int(kept[0]) + left])


def test_foreground_is_that_of_any_channel():
    image = torch.zeros(2, 3, 3, 2)
    image[0, 0, 0], image[1, 2, 2] = 0.5, 0.5
    item = SliceDataset([{"image": image}], prepared)[0]
    assert item["image"].shape == (2, 3, 3)
    assert item["foreground"].nonzero().tolist() == [[0, 0, 0], [0, 2, 2]]


def test_augmentation_is_drawn_anew_and_changes_nothing_that_is_kept():
    def brighten(item):
        return {**item, "image": item["image"].mul_(torch.rand(()))}

    torch.manual_seed(0)
    slices, plain = dataset(augmentation=[brighten]), dataset()
    assert not torch.equal(slices[3]["image"], slices[3]["image"])
    assert torch.equal(slices.images, plain.images)


def test_foreground_is_a_mask_after_any_augmentation():
    turned = RandAffined(("image", "foreground"), prob=1.0, rotate_range=0.3, mode=("bilinear", "nearest"))
    for augmentation in ([turned], [], None):
        item = dataset(augmentation=augmentation)[3]
        assert item["foreground"].dtype == torch.bool
        assert item["foreground"].any()


class Toy(nn.Module):
    """Latent = mean of 2 x 2 pixels."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def encode(self, x):
        mean = nn.functional.avg_pool2d(x, 2) * self.factor
        return mean, torch.full_like(mean, 0.25)


def latent_space():
    space = LatentSpace(Toy(), 2)
    space.scale.fill_(2.0)
    return space


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_latents_are_the_scaled_posterior_of_each_slice(batch_size):
    slices = dataset()
    latents = LatentDataset(slices, latent_space(), batch_size=batch_size)
    assert len(latents) == len(slices)
    item, image = latents[6], slices[6]["image"]
    assert item["mean"].shape == item["std"].shape == (1, 2, 3)
    assert item["mean"].dtype == torch.float32
    expected = 2 * nn.functional.avg_pool2d(image * 2 - 1, 2)
    torch.testing.assert_close(item["mean"], expected, atol=1e-3, rtol=1e-3)
    assert (item["std"] == 0.5).all()
    assert torch.equal(item["foreground"], slices[6]["foreground"])
    assert not item["mean"].requires_grad


def test_copies_have_their_own_augmentation():
    torch.manual_seed(0)
    slices = dataset(augmentation=[lambda item: {**item, "image": item["image"] * torch.rand(())}])
    latents = LatentDataset(slices, latent_space(), copies=3, batch_size=4)
    assert len(latents) == 3 * len(slices)
    first, second = latents[4], latents[4 + len(slices)]
    assert torch.equal(first["foreground"], second["foreground"])
    assert not torch.equal(first["mean"], second["mean"])


def test_latents_of_volumes_are_those_of_their_slices():
    def half(item):
        return {**item, "image": item["image"] / 2}

    data = [{"image": volume(v)} for v in (0.25, 0.5)]
    found = latents(data, prepared, latent_space(), [half], copies=2)
    expected = LatentDataset(SliceDataset(data, prepared, augmentation=[half]), latent_space(), copies=2)
    assert len(found) == len(expected) == 16
    for item, other in zip(found, expected, strict=True):
        assert all(torch.equal(item[key], other[key]) for key in ("mean", "std", "foreground"))
    plain = LatentDataset(SliceDataset(data, prepared), latent_space())
    assert not torch.equal(found[0]["mean"], plain[0]["mean"])


def indices(loader):
    """Of the slices of each batch, by their grey values."""
    values = [item["image"].max().item() for item in loader.dataset]
    return [[values.index(image.max().item()) for image in batch["image"]] for batch in loader]


def test_training_takes_full_batches_in_another_order_each_time():
    torch.manual_seed(0)
    loader = shuffled(dataset(), batch_size=3)
    first, second = indices(loader), indices(loader)
    assert [len(batch) for batch in first] == [3, 3]
    assert len({index for batch in first for index in batch}) == 6
    assert first != second


def test_validation_takes_everything_in_order():
    assert indices(in_order(dataset(), batch_size=3)) == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("load", [shuffled, in_order])
def test_processes_share_the_slices(load, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        shares.append({index for batch in indices(load(dataset(), batch_size=2)) for index in batch})
    assert [len(share) for share in shares] == [4, 4]
    assert not shares[0] & shares[1]


def batch_of(data: Dataset):
    return next(iter(DataLoader(data, batch_size=3)))


def test_prepared_slices_call_an_objective_of_images():
    batch = batch_of(dataset())
    images, target, args, kwargs = prepare_batch(batch, DEVICE)
    assert torch.equal(images, batch["image"])
    assert target is None
    assert args == ()
    assert kwargs.keys() == {"foreground"}
    assert torch.equal(kwargs["foreground"], batch["foreground"])


def test_prepared_latents_call_an_objective_of_a_posterior():
    batch = batch_of(LatentDataset(dataset(), latent_space()))
    images, target, args, kwargs = prepare_batch(batch, DEVICE, non_blocking=True)
    assert images is None
    assert target is None
    assert args == ()
    assert kwargs.keys() == {"foreground", "posterior"}
    assert torch.equal(kwargs["posterior"][0], batch["mean"])
    assert torch.equal(kwargs["posterior"][1], batch["std"])
    assert kwargs["foreground"].shape == (3, 1, 4, 6)


@pytest.mark.parametrize("of_latents", [False, True])
def test_batches_are_moved_in_whole(of_latents):
    data = LatentDataset(dataset(), latent_space()) if of_latents else dataset()
    images, _, _, kwargs = prepare_batch(batch_of(data), torch.device("meta"))
    moved = [kwargs["foreground"], *kwargs.get("posterior", ()), *([] if images is None else [images])]
    assert len(moved) == (3 if of_latents else 2)
    assert all(tensor.device.type == "meta" for tensor in moved)
