"""The picture of a case says on its own whether it may be interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from common.results.case import Case
from common.results.preview import choose_slices, save_preview

BANNER = (176, 0, 32)
DOUBT = "the reconstruction differs from the image 2.9 times as much as in a healthy subject of the calibration"


@pytest.fixture(scope="module")
def draw(phantom, tmp_path_factory):
    """Draw the case of a phantom; the picture (rows, columns, 3)."""
    shape, affine = phantom.grid(spacing_mm=(6.0,) * 3)
    image, brain, lesion = phantom.on_grid(shape, affine)
    maps = {
        "image": image,
        "brain": brain,
        "anomaly_map": 0.2 * lesion,
        "reconstruction": image,
        "segmentation": lesion,
    }
    case = Case(
        "a", **{k: MetaTensor(torch.from_numpy(x.astype(np.float32))[None], affine=affine) for k, x in maps.items()}
    )
    path = tmp_path_factory.mktemp("preview") / "preview.png"

    def drawn(doubts=(), title=""):
        save_preview(case, 0.1, path, doubts, title)
        return np.asarray(Image.open(path).convert("RGB"))

    return drawn


def test_unreliable_case_has_a_red_banner(draw):
    picture = draw([f"{DOUBT}: {DOUBT}", "another one"], "dae")
    red = (picture == BANNER).all(axis=-1)
    rows, columns = (np.flatnonzero(red.any(axis=axis)) for axis in (1, 0))
    assert red.sum() > 0.02 * red.size
    assert rows[-1] < 0.15 * len(red)  # above the slices
    assert columns[0] > 0 and columns[-1] < red.shape[1] - 1  # the whole sentence is in the picture
    white = (picture[rows[0] : rows[-1]] == 255).all(axis=-1) & red[rows[0] : rows[-1]].any(axis=1, keepdims=True)
    assert white.sum() > 100  # the text


def test_reliable_case_has_its_title_alone(draw):
    picture = draw(title="dae")
    assert not (picture == BANNER).all(axis=-1).any()
    assert (picture[: len(picture) // 20] == 255).all(axis=-1).any()


def test_slices_are_those_of_the_brain_and_the_most_abnormal_is_one():
    brain = np.zeros((40, 4, 4), bool)
    brain[5:35] = True
    anomaly_map = np.where(brain, 0.01, 0)
    anomaly_map[9] = 1
    chosen = choose_slices(anomaly_map, brain)
    assert chosen == sorted(set(chosen)) and len(chosen) == 6
    assert 9 in chosen and min(chosen) >= 5 and max(chosen) < 35
    assert choose_slices(anomaly_map[9:11], brain[9:11]) == [0, 1]
