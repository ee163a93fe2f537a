"""Prepared brains and raw maps of the scripts that compare."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor


@pytest.fixture
def script(load_script):
    return load_script("prepared")


def test_what_is_kept_is_made_once(script, tmp_path):
    prepared, made = script.PreparedBrains("dae", tmp_path), []

    def make():
        made.append(1)
        return torch.arange(3)

    for _ in range(2):
        assert prepared.kept("group", "subject", make).tolist() == [0, 1, 2]
    assert len(made) == 1
    prepared.folder = None
    prepared.kept("group", "subject", make)
    assert len(made) == 2


def test_a_difference_is_of_the_same_resamples(script):
    """A map that shows every lesion, against one that shows none."""
    rng = np.random.default_rng(0)
    pairs = []
    for index in range(6):
        lesion = torch.zeros(1, 12, 12, 12, dtype=torch.bool)
        if index % 2:
            lesion[0, 3:6, 3:6, 3:6] = True
        image = MetaTensor(torch.full((1, 12, 12, 12), 0.5))
        noise = torch.from_numpy(rng.random((1, 12, 12, 12))).float()
        pairs.append((script.Brain(f"s{index}", "site", "test", image, lesion), noise, noise + lesion))
    noise, good = (script.evaluated([(pair[0], pair[i]) for pair in pairs], 1.0)["site"] for i in (1, 2))
    row = script.figures(good, noise)
    assert row["auprc"]["value"] == pytest.approx(1.0)
    assert row["healthy_fp_share"]["value"] == 0
    assert row["auprc_difference"]["ci95"][0] > 0.9
    assert "auprc_difference" not in script.figures(good)
