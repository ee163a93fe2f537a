"""The picture of a case says on its own what it shows, and whether it may be interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from monai.data import MetaTensor
from PIL import Image

from common.results.case import Case
from common.results.preview import choose_slices, map_colours, save_preview

BANNER = (176, 0, 32)
DOUBT = "the reconstruction differs from the image 2.9 times as much as in a healthy subject of the calibration"
THRESHOLD = 0.1


def volumes(phantom, spacing_mm=6.0, depth=None):
    """A case of the phantom, whose map is above the threshold in the lesion alone."""
    shape, affine = phantom.grid(spacing_mm=(spacing_mm,) * 3)
    if depth is not None:
        affine[:3, 3] += affine[:3, :3] @ (0, 0, shape[2] // 2)
        shape = (*shape[:2], depth)
    image, brain, lesion = phantom.on_grid(shape, affine)
    maps = {
        "image": image,
        "brain": brain,
        "anomaly_map": np.where(lesion, 2 * THRESHOLD, 0.9 * THRESHOLD * brain),
        "reconstruction": image,
        "segmentation": lesion,
    }
    return {name: MetaTensor(torch.from_numpy(x.astype(np.float32))[None], affine=affine) for name, x in maps.items()}


@pytest.fixture(scope="module")
def draw(phantom, tmp_path_factory):
    """Draw the case of a phantom; the picture (rows, columns, 3) and all texts in it."""
    path = tmp_path_factory.mktemp("preview") / "preview.png"

    def drawn(doubts=(), title="", **options):
        figures = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "common.results.preview.Figure", lambda **given: figures.append(Figure(**given)) or figures[0]
            )
            save_preview(Case("Plantedname", **volumes(phantom, **options)), THRESHOLD, path, doubts, title)
        texts = [text.get_text() for text in figures[0].findobj(Text)]
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB")), texts, picture.info

    return drawn


@pytest.fixture(scope="module")
def reliable(draw):
    return draw(title="dae, status: ok\nthreshold 0.1, calibrated on 24 healthy subjects")


def test_unreliable_case_has_a_red_banner_with_all_its_doubts(draw):
    picture, texts, _ = draw([f"{DOUBT}: {DOUBT}", "slices of 5.0 mm"], "dae, status: unreliable")
    red = (picture == BANNER).all(axis=-1)
    rows, columns = (np.flatnonzero(red.any(axis=axis)) for axis in (1, 0))
    assert red.sum() > 0.02 * red.size / 3
    assert rows[-1] < 0.25 * len(red)  # above the slices
    assert (columns[0], columns[-1]) == (0, red.shape[1] - 1)
    band = picture[rows[0] : rows[-1]]
    white = (band == 255).all(axis=-1)
    assert white.sum() > 100  # the text
    assert not white[:, -20:].any()  # which ends in the picture
    said = " ".join(texts)
    assert "UNRELIABLE, do not interpret" in said
    assert said.count(DOUBT[:40]) == 2 and "slices of 5.0 mm" in said


def test_reliable_case_has_its_title_alone(reliable):
    picture, texts, _ = reliable
    assert not (picture == BANNER).all(axis=-1).any()
    assert (picture[: len(picture) // 20] == 255).all(axis=-1).any()
    assert not any("UNRELIABLE" in text for text in texts)
    assert "dae, status: ok" in texts


def test_sides_places_and_colours_are_said(reliable, phantom):
    _, texts, _ = reliable
    assert texts.count("R") == texts.count("L") == 24  # on each slice of the four rows
    places = [float(text.split()[2]) for text in texts if text.startswith("z = ")]
    shape, affine = phantom.grid(spacing_mm=(6.0,) * 3)
    grid = (affine[2, 2] * np.arange(shape[2]) + affine[2, 3]).round()
    assert len(places) == 6 and places == sorted(places)
    assert set(places) <= set(grid)
    lesion_mm = phantom.centre_mm[2] + phantom.lesion_mm[2]
    assert min(abs(place - lesion_mm) for place in places) <= 3.5
    assert "0.1\nthreshold" in texts and "0.3" in texts


def test_patient_and_file_are_not_named(reliable):
    _, texts, info = reliable
    assert not any("Plantedname" in text or "/" in text for text in texts)
    assert "Plantedname" not in str(info)


def test_nothing_below_the_threshold_is_coloured(reliable, phantom):
    """The map is 0.9 times the threshold in all the brain: only the lesion may have a colour."""
    picture, _, info = reliable
    left, top, right, bottom = map(int, info["map_row"].split())
    row = picture[top:bottom, left:right].astype(int)
    coloured = np.ptp(row, axis=-1) > 40
    coloured &= row[..., 0] > row[..., 2] + 40  # red or yellow; the letters of the sides are blue
    image, _, lesion = phantom.on_grid(*phantom.grid(spacing_mm=(6.0,) * 3))
    brain = np.count_nonzero(image.any(axis=2))
    assert 0 < coloured.mean() < 2 * lesion.any(axis=2).sum() / brain
    colours, norm = map_colours(THRESHOLD)
    red, green, blue, _ = colours(norm(0.99 * THRESHOLD))
    assert red == green == blue
    red, green, _, _ = colours(norm(1.01 * THRESHOLD))
    assert red > 0.8 > green


def test_patients_left_is_on_the_right(draw, phantom):
    """The lesion lies to the right of the patient (RAS x above 0), so in the left half of a slice."""
    picture, _, info = draw()
    left, top, right, bottom = map(int, info["map_row"].split())
    row = picture[top:bottom, left:right].astype(int)
    lesion = row[..., 0] - row[..., 2] > 100
    places = np.flatnonzero(lesion.any(axis=0)) % (row.shape[1] / 6) / (row.shape[1] / 6)
    assert phantom.lesion_mm[0] > 0
    assert places.size and places.mean() < 0.5


@pytest.mark.parametrize("depth", [1, 2])
def test_few_slices_leave_room_for_the_words(depth, draw):
    picture, texts, info = draw([DOUBT], f"dae, status: unreliable\n{DOUBT}", depth=depth)
    assert picture.shape[1] >= 700
    assert sum(text.startswith("z = ") for text in texts) == depth
    edge = picture[: int(info["map_row"].split()[1]), -5:]
    assert ((edge == BANNER).all(axis=-1) | (edge == 0).all(axis=-1)).all()  # no word is cut


def test_slices_are_those_of_the_brain_and_the_most_abnormal_is_one():
    brain = np.zeros((40, 4, 4), bool)
    brain[5:35] = True
    anomaly_map = np.where(brain, 0.01, 0)
    anomaly_map[9] = 1
    chosen = choose_slices(anomaly_map, brain)
    assert chosen == sorted(set(chosen)) and len(chosen) == 6
    assert 9 in chosen and min(chosen) >= 5 and max(chosen) < 35
    assert choose_slices(anomaly_map[9:11], brain[9:11]) == [0, 1]
