import math

import pytest
import torch
from scipy import ndimage

from common.diffusion.corruption import (
    Corruption,
    _rolled,
    biased,
    blurred,
    class_probability,
    mixed,
    nearest,
    range_mask,
    stretched,
)
from common.errors import SettingError
from tests.arrays import golden

ALWAYS = {"clean_share": 0.0, "cluster_share": 0.0}


@pytest.fixture(scope="module")
def texture():
    return {
        key: value.float()[None] if value.ndim == 3 else value for key, value in golden("disyre/foreign_patch").items()
    }


@pytest.fixture(scope="module")
def bias():
    return {key: value[None] if value.ndim == 3 else value for key, value in golden("disyre/intensity_bias").items()}


def brains(batch=16, size=32):
    """Smooth ellipses of 0.2 to 0.8, (batch, 1, size, size), and where they are."""
    torch.manual_seed(5)
    i = torch.linspace(-1, 1, size)
    foreground = ((i[:, None] / 0.8) ** 2 + (i / 0.65) ** 2 < 1).expand(batch, 1, size, size)
    image = 0.2 + 0.6 * blurred(torch.rand(batch, 1, size, size), torch.full((batch,), 0.7))
    return image * foreground, foreground


def drawn(seed=0, batch=16, **settings):
    images, foreground = brains(batch)
    torch.manual_seed(seed)
    return images, foreground, *Corruption(**settings)(images, foreground)


# --- the steps, with given numbers ---


def pasted(texture):
    """The foreign patch around the centre of the golden array, 0 elsewhere."""
    whole = torch.zeros_like(texture["image"])
    (row, column), patch = texture["centre"].tolist(), texture["foreign_patch"][0, 0]
    top, left = row - patch.shape[0] // 2, column - patch.shape[1] // 2
    for r in range(patch.shape[0]):
        for c in range(patch.shape[1]):
            if 0 <= top + r < whole.shape[2] and 0 <= left + c < whole.shape[3]:
                whole[0, 0, top + r, left + c] = patch[r, c]
    return whole


def test_unmatched_foreign_patch(texture):
    corrupted = mixed(texture["image"], pasted(texture), texture["shape"], texture["alpha"].float().view(1))
    torch.testing.assert_close(corrupted, texture["corrupted_fpi"], atol=1e-5, rtol=0)


def test_foreign_patch_is_stretched_to_the_range_it_replaces(texture):
    image, shape = texture["image"], texture["shape"]
    low, high = image[shape > 0].min().view(1, 1, 1, 1), image[shape > 0].max().view(1, 1, 1, 1)
    patch = stretched(pasted(texture), shape > 0, low, high)
    torch.testing.assert_close(patch[shape > 0], texture["patch_minmax"][shape > 0], atol=1e-5, rtol=0)
    corrupted = mixed(image, patch, shape, texture["alpha"].float().view(1))
    torch.testing.assert_close(corrupted, texture["corrupted_dag_texture"], atol=1e-5, rtol=0)


def test_bias_is_restricted_to_the_chosen_classes(bias):
    classes, inside = nearest(bias["image"], bias["codebook"].tolist()), bias["shape"] > 0
    assert torch.equal(classes, bias["quantised"])
    probability = class_probability(classes, inside, 5, 1000)
    torch.testing.assert_close(probability[0, 0].double(), bias["selection_probability"], atol=1e-6, rtol=0)
    mask = range_mask(classes, bias["selected"][None, None])
    torch.testing.assert_close(mask, bias["range_mask_smooth"], atol=1e-6, rtol=0)


def test_a_class_with_few_pixels_is_rarely_chosen_and_all_are_where_none_is():
    classes = torch.arange(81).view(1, 1, 9, 9) % 5
    everywhere = range_mask(classes, torch.zeros(1, 1, 5, dtype=torch.bool))
    torch.testing.assert_close(everywhere, torch.ones_like(everywhere))
    assert class_probability(classes, torch.ones(1, 1, 9, 9, dtype=torch.bool), 5, 1000).max() < 0.05


@pytest.mark.parametrize("sign", [1, -1])
def test_bias(bias, sign):
    corrupted = biased(bias["image"], bias["bias_shape"], sign * bias["alpha"].view(1))
    torch.testing.assert_close(corrupted, bias[f"corrupted_sign{sign:+d}"], atol=1e-6, rtol=0)
    effective = (corrupted - bias["image"]).abs().max()
    torch.testing.assert_close(effective, bias[f"alpha_bias_effective_sign{sign:+d}"], atol=1e-6, rtol=0)


def test_blur_is_that_of_scipy_for_each_sample():
    x, sigma = torch.rand(4, 2, 20, 33, dtype=torch.float64), torch.tensor([0.0, 0.4, 1.3, 2.0])
    for sample, s, result in zip(x, sigma, blurred(x, sigma), strict=True):
        expected = ndimage.gaussian_filter(sample.numpy(), (0, float(s), float(s)))
        torch.testing.assert_close(result, torch.from_numpy(expected), atol=1e-6, rtol=0)


# --- what is drawn ---


def test_the_seed_decides():
    _, _, first, severity = drawn(1)
    _, _, again, same = drawn(1)
    _, _, other, another = drawn(2)
    assert torch.equal(first, again)
    assert torch.equal(severity, same)
    assert (first - other).abs().max() > 0.1
    assert not torch.equal(severity, another)


def test_nothing_changes_outside_of_the_foreground_or_leaves_the_range():
    images, foreground, corrupted, severity = drawn(batch=64)
    assert torch.equal(corrupted * ~foreground, images * ~foreground)
    assert 0 <= corrupted.min() <= corrupted.max() <= 1
    assert 0 <= severity.min() <= severity.max() <= 1 + 1e-6


def test_clean_slices_have_severity_0_and_are_as_many_as_asked_for():
    images, _, corrupted, severity = drawn(batch=300, clean_share=0.15)
    clean = (corrupted == images).flatten(1).all(dim=1)
    assert (severity[clean] < 1e-3).all()
    assert (severity[~clean] > 0).all()
    assert 0.09 < clean.float().mean().item() < 0.21
    images, _, corrupted, severity = drawn(batch=50, clean_share=1.0)
    assert torch.equal(corrupted, images)
    assert (severity == 0).all()


def test_changes_in_several_places():
    """Each of them is drawn anew, and the severity is that of the most severe one."""
    alike = {"texture_amount": (1e-4, 1e-4), "bias_amount": (0.3, 0.3), "dark_share": 1.0}
    parts = []
    for most in (1, 6):
        images, _, corrupted, severity = drawn(
            batch=40, **ALWAYS, **alike, size=(3.0, 3.0), max_blur=0.0, most_places=most
        )
        changed = (images - corrupted)[:, 0] > 0.05
        parts.append(torch.tensor([ndimage.label(c)[1] for c in changed.numpy()]).float())
        assert severity.max() < 0.31
    assert parts[0].max() <= 2
    assert parts[1].max() >= 3
    assert parts[1].mean() > 1.7 * parts[0].mean()


def test_severity_of_a_bias_is_the_largest_change():
    images, _, corrupted, severity = drawn(batch=100, texture_amount=(1e-4, 1e-4))
    change = (corrupted - images).abs().amax(dim=(1, 2, 3))
    assert (change > 0.01).float().mean() > 0.4
    torch.testing.assert_close(severity, change, atol=2e-4, rtol=0)


def test_small_soft_shapes_do_not_claim_a_severity_that_they_lack():
    amounts = {"texture_amount": (1.0, 1.0), "bias_amount": (1e-4, 1e-4)}
    *_, severity = drawn(batch=100, **ALWAYS, size=(3.0, 3.0), max_blur=2.0, **amounts)
    texture = severity > 1e-3
    assert severity[texture].min() < 0.5
    assert severity[texture].max() > 0.99


def areas(number, **settings):
    """Of shapes without soft borders that lie within the slice."""
    foreground = torch.ones(number, 1, 64, 64, dtype=torch.bool)
    torch.manual_seed(0)
    hard = Corruption(max_blur=0.0, cluster_share=0.0, **settings).shapes(foreground)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    rim = hard.clone()
    rim[..., 1:-1, 1:-1] = 0
    return hard.sum(dim=(1, 2, 3))[rim.sum(dim=(1, 2, 3)) == 0]


def test_quantiles_of_the_areas():
    """Diameters of 3 to 22 pixels, log-uniform: the 5, 50 and 95 % quantiles are 3.3, 8.1 and 19.9."""
    low, middle, high = areas(300).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert 5 <= low <= 13
    assert 35 <= middle <= 70
    assert 180 <= high <= 420


@pytest.mark.parametrize("diameter", [3.0, 8.0, 22.0])
def test_diameter_is_that_of_a_disk_or_the_side_of_a_square(diameter):
    area = areas(60, size=(diameter, diameter)).median().item()
    assert 0.7 * math.pi / 4 <= area / diameter**2 <= 1.3


def test_clusters_have_several_small_shapes():
    foreground = torch.ones(40, 1, 96, 96, dtype=torch.bool)
    torch.manual_seed(0)
    settings = {"cluster_share": 1.0, "cluster_count": (4, 4), "cluster_size": (3.0, 4.0), "max_blur": 0.0}
    shapes = Corruption(**settings).shapes(foreground)
    parts = torch.tensor([ndimage.label(shape)[1] for shape in shapes[:, 0].numpy()]).float()
    assert parts.median() == 4
    assert shapes.sum(dim=(1, 2, 3)).median() < 4 * 16


def test_borders_are_soft():
    foreground = torch.ones(50, 1, 48, 48, dtype=torch.bool)
    torch.manual_seed(0)
    shapes = Corruption(**ALWAYS).shapes(foreground)
    soft = ((shapes > 0.1) & (shapes < 0.9)).flatten(1).any(dim=1)
    assert 0.5 < soft.float().mean() < 0.9


@pytest.mark.parametrize("dark_share", [0.0, 1.0])
def test_share_of_dark_changes(dark_share):
    images, _, corrupted, _ = drawn(batch=60, **ALWAYS, dark_share=dark_share, texture_amount=(1e-4, 1e-4))
    change = (corrupted - images) * (1 if dark_share == 0 else -1)
    assert change.min() > -1e-4
    assert change.max() > 0.2


def test_a_flat_patch_is_flat_and_dark_as_a_cavity():
    images, _ = brains(64)
    shape = torch.zeros_like(images)
    shape[..., 10:22, 10:22] = 1
    torch.manual_seed(0)
    patch = Corruption(flat_share=1.0, dark_share=1.0)._foreign_patch(images, images, shape)[..., 10:22, 10:22]
    host = images[..., 10:22, 10:22]
    assert (patch.std(dim=(1, 2, 3)) < 0.06).all()
    assert (patch.mean(dim=(1, 2, 3)) < host.mean(dim=(1, 2, 3)) + 0.1).all()
    assert patch.mean(dim=(1, 2, 3)).min() < 0.2


def test_foreign_texture_is_of_another_slice():
    images = torch.full((4, 1, 32, 32), 0.1) * torch.arange(1, 5).view(4, 1, 1, 1)
    torch.manual_seed(0)
    assert (_rolled(images) != images).all()
    assert torch.equal(_rolled(images[:1]), images[:1])


def test_autocast_changes_nothing():
    (images, foreground), results = brains(), []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(Corruption()(images, foreground))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "setting",
    [
        {"size": (0.0, 3.0)},
        {"size": (5.0, 3.0)},
        {"cluster_size": (-1.0, 3.0)},
        {"cluster_count": (0, 2)},
        {"texture_amount": (0.1, 1.1)},
        {"bias_amount": (0.0, 1.0)},
        {"clean_share": 1.2},
        {"dark_share": -0.1},
        {"flat_share": 2.0},
        {"cluster_share": 1.01},
        {"max_blur": -1.0},
        {"most_places": 0},
        {"pseudo_count": -1.0},
        {"levels": ()},
        {"size": 3.0},
        {"size": "large"},
        {"clean_share": "none"},
    ],
)
def test_bad_settings_are_refused_in_one_line(setting):
    with pytest.raises(SettingError) as error:
        Corruption(**setting)
    assert next(iter(setting)) in str(error.value)
    assert "\n" not in str(error.value)
