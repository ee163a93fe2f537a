"""The sprite experiment, end to end, with a method that reconstructs nothing: its map is the image."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from common.methods.ae import AE
from common.weights import save_weights, sha256
from common.workflows.variants import Variant

CONFIG = {
    "weights": "none.pt",
    "median_size": 1,
    "network_def": {
        "_target_": "common.detection.volume.VolumeDetector",
        "detector": {
            "_target_": "common.methods.ae.AE",
            "network": {
                "_target_": "AutoEncoder",
                "spatial_dims": 2,
                "in_channels": 1,
                "out_channels": 1,
                "channels": [2],
                "strides": [2],
            },
            "median_size": "@median_size",
        },
    },
    "preprocessing": {"_target_": "common.transforms.head.HeadCTPreprocessing"},
}


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("evaluate_sprites")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of an inference.json, whose weights lie beside it."""
    path = tmp_path_factory.mktemp("bundle") / "method" / "configs" / "inference.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    network = ConfigParser(CONFIG).get_parsed_content("network_def")
    for value in network.detector.parameters():
        value.data.zero_()
    save_weights(network.state_dict(), path.with_name("model.pt"))
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three heads of 95 to 105 with a brighter square on one side, not the same in any slice, and three clean ones."""
    folder = tmp_path_factory.mktemp("sprites")
    affine = np.diag([-4.0, -4.0, 5.0, 1.0])
    rows, columns = np.indices((64, 64))
    head = np.hypot(rows - 31.5, columns - 31.5) < 24
    clean = np.repeat(np.where(head, 95 + (2 * rows + 3 * columns) % 11, 25)[..., None], 3, axis=2).astype(np.uint8)
    sprites = np.zeros_like(clean)
    for place in range(3):
        sprites[20:28, 24 + 4 * place : 32 + 4 * place, place] = 1
    for name, volume in (("a", np.where(sprites, 200, clean)), ("a_lesion", sprites), ("b", clean)):
        nib.save(nib.Nifti1Image(volume.astype(np.uint8), affine), folder / f"{name}.nii.gz")
    rows = ["subject,split,CT,brain,lesion", "a,test,a.nii.gz,,a_lesion.nii.gz", "b,test,b.nii.gz,,", "c,train,c,,"]
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_table_and_json(script, config, cohort, tmp_path, capsys):
    weights = config.with_name("model.pt")
    row = f"{config}:weights={weights}"
    script.main([cohort, cohort], [row, f"{row},network_def::seed=3"], tmp_path / "out" / "result.json")
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    bright, dark, mine, other = result["rows"]
    assert [row["name"] for row in (bright, dark)] == ["intensity, bright", "intensity, dark"]
    assert [row["name"] for row in (mine, other)] == ["method", "method network_def::seed=3"]
    assert (mine["seed"], other["seed"]) == (0, 3)
    assert mine["weights_sha256"] == sha256(weights)
    for metrics in (mine["metrics"], bright["metrics"]):  # the brightest pixels are the sprites
        assert {name: metric["mean"] for name, metric in metrics.items()} == dict.fromkeys(script.METRICS, 1.0)
        assert all(metric["values"] == [1.0, 1.0] for metric in metrics.values())
    assert dark["metrics"]["max_dice"]["mean"] < 0.2
    assert mine["seconds_per_100"] > 0
    assert result["cohorts"] == [cohort.name] * 2
    text = (tmp_path / "out" / "result.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert "| method | 1.000 (1.000-1.000) |" in text
    assert "| paper: latent DDPM (c) | 0.920 | 0.955 | - | - | 0.827 | 0.702 | - | - |" in text
    assert "| paper: AE | 0.165 | 0.093 | - | - | - | - | - | - |" in text
    assert {row.count("|") for row in text.splitlines()} == {10}


@pytest.mark.parametrize("separate", [False, True])
def test_images_are_ranked_by_the_methods_own_score_too(separate, script, config, cohort, tmp_path, monkeypatch):
    """One that is higher without a sprite, with the map or by passes of its own; that of the map stays."""

    def score(self, image, foreground, generators):
        return -image.sum(dim=(1, 2, 3)) + torch.tensor([g.initial_seed() * 1e-3 for g in generators])

    def detect(self, image, foreground, generators):
        return *_detect(self, image, foreground, generators), score(self, image, foreground, generators)

    _detect = AE._detect
    monkeypatch.setattr(AE, *(("score", score) if separate else ("_detect", detect)))
    result = tmp_path / "result.json"
    script.main([cohort], [f"{config}:weights={config.with_name('model.pt')}"], result, batch_size=4)
    *_, row = json.loads(result.read_text(encoding="utf-8"))["rows"]
    assert {name: metric["values"] for name, metric in row["metrics"].items()} == {
        **{name: [1.0] for name in script.METRICS},
        "method_auroc": [0.0],
        "method_auprc": [pytest.approx((1 / 4 + 2 / 5 + 3 / 6) / 3)],
    }
    assert ("score_seconds_per_100" in row) is separate
    line = result.with_suffix(".md").read_text(encoding="utf-8").splitlines()[4]
    assert line.startswith("| method | 1.000 | 1.000 | 1.000 | 1.000 | 0.000 | 0.383 |")
    assert line.endswith("| - |") is not separate
    row = Variant.parse(f"{config}:weights={config.with_name('model.pt')}")
    by_map = script.measure(row, [cohort], "cpu", batch_size=4, with_score=False)
    assert ("method_auroc" in by_map["metrics"]) is not separate  # what comes with the map costs nothing


def test_slices_sprites_and_places_belong_together(script, cohort):
    preprocessing = ConfigParser(CONFIG).get_parsed_content("preprocessing")
    slices, sprites, positions = script.read_slices(cohort / "cohort.csv", preprocessing)
    assert slices.shape == (6, 1, 64, 64)
    assert positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert sprites.flatten(1).sum(dim=1).tolist() == [64, 64, 64, 0, 0, 0]
    assert torch.equal(slices[:, 0] > 0.7, sprites)


def test_method_gets_each_slice_with_the_seed_of_its_place(script, config, cohort, monkeypatch):
    seen = []
    row = Variant.parse(f"{config}:weights={config.with_name('model.pt')},network_def::seed=2")
    detector = ConfigParser(CONFIG).get_parsed_content("network_def").detector
    detect = type(detector).detect

    def spy(self, image, foreground=None, seeds=None):
        seen.append(seeds)
        return detect(self, image, foreground, seeds)

    monkeypatch.setattr(type(detector), "detect", spy)
    script.measure(row, [cohort], "cpu", batch_size=4)
    assert [len(seeds) for seeds in seen] == [4, 2]
    assert (torch.cat(seen) - 2 * 1_000_003).tolist() == [0, 1, 2, 0, 1, 2]
