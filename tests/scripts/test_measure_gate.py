"""Which subjects are held to be unreliable, by the scales of whose calibration."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def script(load_script):
    return load_script("measure_gate")


def subject(name, scale, order=0.6, modes=(0.37, 0.62, 0.76)):
    signs = {"map_scale": scale, "contrast_order": order, "vessel_share": 0.0}
    return {"subject": name, "signs": signs, "tissue_modes": list(modes)}


def test_scale_order_and_modes_are_reasons(script):
    tested = [subject("good", 0.9), subject("wide", 2.0), subject("turned", 1.0, order=-0.1)]
    tested.append(subject("flat", 1.0, modes=(None, None, None)))
    row = script.row(tested, torch.tensor([1.0, 0.5]))
    assert row["tested"] == 4
    assert set(row["reasons"]) == {"wide", "turned", "flat"}
    assert row["unreliable"] == 3
    assert row["limit_of_scale"] == pytest.approx(1.55)


def test_without_other_sites_the_scale_says_nothing(script):
    row = script.row([subject("wide", 2.0)], torch.tensor([]))
    assert row["unreliable"] == 0
    assert row["limit_of_scale"] is None
