"""The stages of each method are those of its own run, which leave no trace in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from common.bundle import BUNDLES_DIR
from common.report.stages import Panel, calls_of, foreground_box, save_stages, some, stages

SIZE = 48
ROWS = {  # of the compact settings: the names of the panels of each row begin so
    "mad_ad": ["input", "mask, t = ", "z after t = "],
    "latent_ddpm": ["input", "KL map", "z after t = "],
    "auto_ddpm": ["input", "resampled at t = "],
    "ano_ddpm": ["input", "noised to t = ", "L = 50", "L = 50"],
    "thor": ["input", "x0 at t = ", "disagreement, t = "],
    "berdiff": ["input", "masked bits, pass 1", "pass 1"],
    "pddpm": ["input", "patch 1 noised", "x0 from patch 1"],
    "cddpm": ["input", "noised to t = ", "x0 from t = "],
    "disyre": ["input", "restored, severity 1.00", "change, severity 1.00"],
    "iter_mask2": ["input", "mask, round 1", "rebuilt, round 1"],
    "cycle_unet_glioma": ["input"],
    "ar_transformer": ["input", "-log p, order 1", "replaced, order 1", "healed, order 1"],
    "ar_transformer_headct": ["input", "-log p, order 1", "replaced, order 1", "healed, order 1"],
    "dae": ["input"],
}


@pytest.fixture(scope="module")
def image():
    """A disc with a gradient and a spot, (1, 1, H, W)."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    inside = (rows - SIZE / 2) ** 2 + (columns - SIZE / 2) ** 2 < 400
    spot = (rows - 20) ** 2 + (columns - 28) ** 2 < 16
    return ((0.3 + rows / 100 + 0.3 * spot) * inside)[None, None]


@pytest.fixture(scope="module", params=ROWS)
def detector(request):
    """The compact network of a bundle, untrained."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLES_DIR / request.param / "configs" / "inference.json"))
    torch.manual_seed(0)
    return request.param, parser.get_parsed_content("network_def").detector.eval()


def test_stages_are_those_of_the_result(detector, image):
    name, method = detector
    seeds = torch.tensor([3])
    before = {key: value for key, value in vars(method).items() if not key.startswith("_")}
    rows = stages(method, image, seeds)
    assert [row[0].name[: len(start)] for row, start in zip(rows, ROWS[name], strict=True)] == ROWS[name]
    found = method.detect(image, seeds=seeds)
    shown = {panel.name: panel.picture for panel in rows[0]}
    torch.testing.assert_close(shown["input"], image[0, 0])
    torch.testing.assert_close(shown["anomaly map"], found.anomaly_map[0, 0])
    torch.testing.assert_close(shown["reconstruction"], found.reconstruction[0, 0])
    assert {key: value for key, value in vars(method).items() if not key.startswith("_")} == before
    for panel in (panel for row in rows for panel in row):
        assert panel.picture.ndim == 2
        assert panel.picture.isfinite().all(), panel.name
        assert panel.kind == "signed" or panel.picture.min() >= 0, panel.name
        assert panel.kind not in ("image", "mask") or panel.picture.max() <= 1, panel.name


def test_calls_are_noted_and_the_method_is_given_back():
    class Owner:
        def double(self, value):
            return 2 * value

    owner = Owner()
    with calls_of(owner, "double") as calls:
        assert owner.double(3) == 6
        assert owner.double(value=4) == 8
    assert calls == [((3,), 6), ((), 8)]
    assert vars(owner) == {}


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 1, 2]), (6, list(range(6))), (11, [0, 2, 4, 6, 8, 10])])
def test_some_are_spread_with_both_ends(count, expected):
    assert some(range(count)) == expected


def test_picture_holds_the_panels(tmp_path):
    bright = [Panel("one", torch.ones(8, 8)), Panel("two", torch.full((8, 8), 3.0), "map")]
    save_stages([bright, [Panel("three", torch.randn(4, 4), "signed")]], tmp_path / "a.png", "title")
    with Image.open(tmp_path / "a.png") as picture:
        values = torch.tensor(np.asarray(picture.convert("L")).copy())
    assert values.shape[1] > values.shape[0] / 2
    third = values.shape[0] // 3
    assert (values[:third, : values.shape[1] // 2] > 250).float().mean() > 0.1
    assert (values[-10:, -values.shape[1] // 3 :] == 0).all()  # no panel below the second


def test_seen_from_below_and_cut_to_the_foreground(tmp_path):
    """The first axis is from the patient's left to the right, the second to the front."""
    picture = torch.zeros(20, 40)
    picture[4:14, 10:30] = 0.3
    picture[12:14, 27:30] = 1  # at the right, in front
    assert foreground_box(picture) == pytest.approx((0.28, 0.82, 0.23, 0.77))
    save_stages([[Panel("input", picture), Panel("map", picture, "map")]], tmp_path / "a.png", "")
    with Image.open(tmp_path / "a.png") as drawn:
        grey = np.asarray(drawn.convert("L"))[60:, : drawn.width // 3]  # the first panel, without its marks
    spot = np.argwhere(grey > 250).mean(0)
    tissue = np.argwhere(grey > 50)
    low, high = tissue.min(0), tissue.max(0)
    assert ((spot - low) / (high - low) < 0.2).all()


def test_a_colour_bar_says_the_scale(tmp_path, monkeypatch):
    """Of each map its own, but one of a row of maps."""
    said = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_yticklabels", lambda axes, labels, **_: said.append(labels))
    one, two = (Panel("map", torch.full((8, 8), top), "map") for top in (0.5, 250.0))
    signed = Panel("z", torch.full((8, 8), -2.0), "signed")
    save_stages([[Panel("input", torch.ones(8, 8)), one, signed], [one, two]], tmp_path / "a.png", "")
    assert said == [["0", "0.5"], ["-2", "2"], ["0", "250"]]
