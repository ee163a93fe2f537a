"""The steps of the normalisation on whole heads: who is a subject, who is healthy, and what the steps change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from common.cohorts.headct_sprites import save

NAMES = [f"val/{n}" for n in range(4)]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("measure_heads")


def volume(depth, marked=(), seed=0, scale=1.0):
    """Noise within a disc, ten times as high in a square of the marked slices."""
    random = np.random.default_rng(seed)
    y, x = np.indices((16, 16)) - 7.5
    brain = np.repeat((np.hypot(x, y) < 7)[None, ..., None], depth, axis=-1)
    lesion = np.zeros_like(brain)
    lesion[:, 5:9, 5:9, list(marked)] = True
    values = (random.random(brain.shape) * np.where(lesion, 10, 1) * scale).astype(np.float32)
    return {
        "map": torch.from_numpy(values * brain),
        "brain": torch.from_numpy(brain),
        "lesion": torch.from_numpy(lesion & brain),
    }


def test_slices_beside_a_lesion_are_neither_healthy_nor_abnormal(script):
    volumes = {"a": volume(8, marked=[3, 4]), "b": volume(3)}
    by_volume, by_slice = (script.subjects_of(volumes, by) for by in ("volume", "slice"))
    assert {name: x["map"].shape[-1] for name, x in by_volume.items()} == {"a": 8, "a/healthy": 4, "b/healthy": 3}
    assert torch.equal(by_volume["a/healthy"]["map"], volumes["a"]["map"][..., [0, 1, 6, 7]])
    assert [name for name in by_slice if name.startswith("a")] == [f"a/{n}" for n in (0, 1, 3, 4, 6, 7)]
    assert set(script.healthy(by_slice)) == {"a/0", "a/1", "a/6", "a/7", "b/0", "b/1", "b/2"}


def test_slices_without_a_head_are_left_out(script):
    empty = volume(2)
    empty["brain"][..., 1] = False
    assert list(script.subjects_of({"a": empty}, "slice")) == ["a/0"]


def test_a_healthy_stack_of_a_patient_whose_volume_is_there_is_not_read_twice(script):
    items = [{"subject": name} for name in ("p1_healthy", "p1", "p2_healthy", "p3")]
    assert [item["subject"] for item in script.without_stacks(items)] == ["p1", "p2_healthy", "p3"]


def test_a_stack_gets_a_sprite_on_each_slice(script, tmp_path):
    stack = np.full((3, 64, 64), 100, np.uint8)
    save(stack, tmp_path / "val000.nii.gz")
    item = {"subject": "val000", "image": str(tmp_path / "val000.nii.gz"), "split": "val"}
    first, second = (script.with_sprites(item, draw, tmp_path) for draw in (0, 1))
    drawn, lesion = (script.np.asarray(script.nib.load(first[key]).dataobj) for key in ("image", "lesion"))
    assert lesion.any(axis=(0, 1)).all() and (drawn[lesion > 0] != 100).all() and (drawn[lesion == 0] == 100).all()
    assert first["subject"] != second["subject"] and item["image"] != first["image"]
    assert not np.array_equal(lesion, np.asarray(script.nib.load(second["lesion"]).dataobj))


def test_the_steps_change_what_they_say(script):
    subject = volume(1, marked=[0])
    raw, inside = subject["map"][0].numpy(), subject["brain"][0].numpy()
    assert np.array_equal(script.changed(subject, False, 0.0), raw)
    z = script.changed(subject, True, 0.0)
    assert np.median(z[inside]) == pytest.approx(0, abs=1e-6)
    assert np.median(np.abs(z[inside])) == pytest.approx(1, rel=1e-5)
    smooth = script.changed(subject, False, 1.5)
    assert smooth[inside].std() < raw[inside].std() and not smooth[~inside].any()


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({}, "raw map"),
        ({"smoothing_vox": [1.5, 1.5, 0]}, "4, 1.5 voxels"),
        ({"normalisation": {"smoothing_vox": 0}}, "1"),
        ({"smoothing_vox": 4.0}, None),
    ],
)
def test_the_variant_that_a_bundle_does(script, config, variant):
    assert script.shipped(ConfigParser(config)) == variant


def test_a_validation_subject_is_measured_with_the_threshold_of_the_others(script):
    """One healthy subject has ten times the values of the rest: with its own values in it the threshold would be 8."""
    found = {"val": {name: volume(1, seed=n, scale=10.0 if n == 0 else 1.0) for n, name in enumerate(NAMES)}}
    found["val"]["val/4"] = volume(1, marked=[0], seed=4)
    found["test"] = {"test/0": volume(1, seed=5), "test/1": volume(1, marked=[0], seed=6)}
    raw = script.measure(found, False, 0.0)
    assert raw["val"]["healthy_worst_share"]["value"] > 0.8
    assert raw["test"]["healthy_fp_share"]["value"] == 0
    z = script.measure(found, True, 0.0)
    assert z["val"]["healthy_worst_share"]["value"] < 0.1
    assert z["test"]["auprc"]["value"] > 0.9
