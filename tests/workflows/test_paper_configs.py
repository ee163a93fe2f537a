"""The paper's own data sets and sizes: cohort script, both stages, calibration, inference and evaluation, in small."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle

from common.bundle import BUNDLES_DIR

CONFIGS = next(
    folder
    for folder in (BUNDLES_DIR / "berdiff" / "configs", Path(__file__).parent / "berdiff")
    if (folder / "train.json").is_file()
)
STEPS = {"batch_size": 2, "epoch_length": 2, "max_epochs": 1}
SMALL = {
    "num_inference_steps": 2,
    "autoencoder::channels": [8, 8, 8, 8],
    "autoencoder::latent_channels": 8,
    "autoencoder::embedding_channels": 8,
    "autoencoder::num_res_blocks": 1,
    "autoencoder::norm_num_groups": 4,
    "unet::latent_channels": 8,
    "unet::channels": [8, 8],
    "unet::attention_levels": [False, True],
    "unet::num_res_blocks": 1,
    "unet::norm_num_groups": 4,
}
SMALL_SLICES = {
    "brats2020": {"preprocessing::canvas": 64, "preprocessing::brain_volume_ml": [5, 2300]},
    "oct2017": {"preprocessing::size": 64},
}


def parsed(config, paper):
    parser = ConfigParser()
    stage = ["train", config] if config == "train_autoencoder" else [config]
    parser.read_config([str(CONFIGS / f"{name}.json") for name in (*stage, paper)])
    parser.update({"bundle_root": "nowhere", "device": "$torch.device('cpu')"})
    return parser.get_parsed_content


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("paper", "channels", "autoencoder", "L"), [("brats2020", 4, 4_103_716, 200), ("oct2017", 1, 4_101_985, 300)]
)
@pytest.mark.parametrize("config", ["train", "inference"])
def test_networks_have_the_papers_size(config, paper, channels, autoencoder, L):
    with torch.device("meta"):
        detector = parsed(config, paper)("network_def").detector
    assert count(detector.latent_space) == autoencoder
    assert count(detector.unet) == 36_034_432
    with torch.device("meta"):
        p, _ = detector.latent_space.posterior(torch.rand(1, channels, 256, 256))
    assert p.shape == (1, 128, 32, 32)
    assert detector.scheduler.timesteps == list(range(L - 1, -1, -1))
    assert detector.P == 0.5
    assert (detector.scheduler.soft_z0, detector.scheduler.reference) == ("inserted", "paper")
    assert detector.num_passes == 1


@pytest.mark.parametrize("paper", ["brats2020", "oct2017"])
def test_each_stage_has_its_own_settings(paper):
    for config, batch_size, learning_rate, steps in (
        ("train_autoencoder", 6, 2.7e-5, 12_000),
        ("train", 32, 1e-4, 200_000),
    ):
        item = parsed(config, paper)
        assert (item("batch_size"), item("learning_rate")) == (batch_size, learning_rate)
        assert item("max_epochs") * item("epoch_length") == steps
        assert item("augmentation") is None
        assert (item("ema_decay"), item("max_norm"), item("bfloat16")) == (0, None, False)


@pytest.mark.parametrize("paper", ["brats2020", "oct2017"])
def test_learning_rate_is_constant_and_of_adam(paper):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", "train_autoencoder", paper)])
    parser.update({"bundle_root": "nowhere"} | {k: v for k, v in SMALL.items() if k.startswith("autoencoder")})
    schedule = parser.get_parsed_content("lr_scheduler")
    assert type(schedule.optimizer) is torch.optim.Adam
    for _ in range(10):
        schedule.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [2.7e-5]


@pytest.mark.parametrize("paper", ["brats2020", "oct2017"])
def test_all_workflows_run_on_the_papers_data(paper, request, tmp_path, monkeypatch):
    """Two steps of each training, then one case and the test set; the outputs are on the grid of the input."""
    _, cohort = request.getfixturevalue(paper)
    monkeypatch.setattr(sys, "path", [*sys.path])  # MONAI adds the bundle's folder
    with (cohort / "cohort.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    case = next(row for row in rows if row[1] == "test" and row[-1])
    case = [*case[:2], *(str(cohort / name) if name else "" for name in case[2:])]
    (tmp_path / "case.csv").write_text(f"{','.join(header)}\n{','.join(case)}\n", encoding="utf-8")

    def run(*configs, **override):
        files = [str(CONFIGS / f"{config}.json") for config in (*configs, paper)]
        settings = SMALL | SMALL_SLICES[paper] | {"bundle_root": str(tmp_path), "output_dir": str(tmp_path / "out")}
        run_bundle(config_file=files, **(settings | override))

    run("train", "train_autoencoder", dataset_dir=str(cohort), **STEPS)
    run("train", dataset_dir=str(cohort), **STEPS)
    assert (tmp_path / "out" / "model.pt").is_file()
    weights = {"weights": str(tmp_path / "out" / "model.pt")}
    run("inference", "calibrate", dataset_dir=str(cohort), **weights)
    run("inference", image=str(tmp_path / "case.csv"), **weights)
    result = tmp_path / "out" / case[0]
    anomaly_map, source = nib.load(result / "anomaly_map.nii.gz"), nib.load(case[2])
    assert anomaly_map.shape == source.shape
    np.testing.assert_allclose(anomaly_map.affine, source.affine)
    assert anomaly_map.get_fdata()[source.get_fdata() > 0].max() > 0
    assert len(json.loads((result / "run.json").read_text(encoding="utf-8"))["settings"]) > 1
    run("inference", "evaluate", dataset_dir=str(cohort), **weights)
    figures = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert 0 <= figures["image_auroc"]["value"] <= 1
    assert figures["n_subjects"] == {"brats2020": 1, "oct2017": 2}[paper]
