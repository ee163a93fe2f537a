"""What a GPU would be measured by, on the CPU: two slices of the smallest bundle."""

from __future__ import annotations

import json

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from common.errors import SettingError


@pytest.fixture
def script(load_script, monkeypatch):
    script = load_script("bench_gpu")
    monkeypatch.setattr(script, "PEAK_S", 0.05)
    return script


def test_table_and_json(script, tmp_path, capsys):
    script.main(tmp_path / "out", ["ae_headct"], device="cpu", repeats=1, slices=2)
    result = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert result["device"] == "cpu"
    assert min(result["peak_tflops"].values()) > 0
    (row,) = result["rows"]
    assert (row["name"], row["slices"]) == ("ae_headct", 2)
    for name in ("float32", "bfloat16"):
        assert row[name]["network_s"] > 0
        share = row["tflop"] / row[name]["network_s"] / result["peak_tflops"][name]
        assert row[name]["share_of_peak"] == pytest.approx(share)
    assert 0 < row["difference_share_of_maximum"] < 0.5
    assert row["segmentation_dice"] is None or 0 <= row["segmentation_dice"] <= 1
    text = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_without_a_gpu_one_line_says_what_to_do(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError, match="torch finds no GPU on this machine; choose cpu"):
        script.main(tmp_path / "out", ["ae_headct"])
    assert not (tmp_path / "out").exists()


def test_slices_are_those_of_the_middle(script):
    image = torch.zeros(1, 4, 4, 10)
    image[..., 2:8] = 1
    for count, kept in ((2, [4, 5]), (None, [*range(2, 8)]), (20, [*range(2, 8)])):
        left = script.middle(MetaTensor(image), 2, count)
        assert left.as_tensor().sum(dim=(0, 1, 2)).nonzero().flatten().tolist() == kept
        assert script.used_slices(left.as_tensor()[None], 2) == len(kept)


def test_bfloat16_is_used_where_it_is_asked_for(script):
    network, image = nn.Conv3d(1, 2, 1), torch.rand(1, 1, 4, 4, 4)
    network.weight.data.fill_(1.001)  # which bfloat16 rounds
    found = {name: script.passes(network, image, dtype, 1)[1] for name, dtype in script.FORMATS.items()}
    torch.testing.assert_close(found["float32"], network(image)[0])
    assert found["bfloat16"].dtype == torch.float32
    assert 0 < (found["float32"] - found["bfloat16"]).abs().max() < 0.02


def test_maps_and_segmentations_are_compared(script):
    def written(values, voxels):
        mask = torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
        mask.flatten()[:voxels] = 1
        return {"anomaly_map": MetaTensor(torch.full((1, 2, 2, 2), values)), "segmentation": MetaTensor(mask)}

    found = script.compared(written(2.0, 3), written(1.5, 1))
    assert found == {"difference_share_of_maximum": 0.25, "segmented_voxels": 3, "segmentation_dice": 0.5}
    assert script.compared(written(2.0, 0), written(2.0, 0))["segmentation_dice"] is None
