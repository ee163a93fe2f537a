"""Each bundle has a picture of its stages, of the weights that it has, as it is drawn today."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.bundle import BUNDLES_DIR, WEIGHTS, available_bundles
from common.weights import sha256

PICTURES = Path(__file__).parents[2] / "docs" / "methods"
MAX_BYTES, MAX_BYTES_OF_ALL = 100_000, 1_500_000
QUICK = "vae_headct"


@pytest.mark.parametrize("key", available_bundles())
def test_picture_is_of_the_weights(key):
    """Where this fails after a training, run scripts/make_stage_pictures.py with the key."""
    picture = PICTURES / f"{key}.png"
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
        assert opened.width > 600
        assert opened.text["weights_sha256"] == sha256(BUNDLES_DIR / key / WEIGHTS)
    assert picture.stat().st_size < MAX_BYTES


def test_pictures_are_small_and_of_bundles_that_there_are():
    pictures = list(PICTURES.iterdir())
    assert {path.name for path in pictures} == {f"{key}.png" for key in available_bundles()}
    assert sum(path.stat().st_size for path in pictures) < MAX_BYTES_OF_ALL


def test_a_picture_is_drawn_as_it_is_there(tmp_path, load_script):
    load_script("make_stage_pictures").main([QUICK], tmp_path)
    drawn, there = (
        np.asarray(Image.open(folder / f"{QUICK}.png").convert("RGB"), float) for folder in (tmp_path, PICTURES)
    )
    assert drawn.shape == there.shape
    assert np.abs(drawn - there).mean() < 3  # other versions round otherwise
