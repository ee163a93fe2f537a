"""Two scanners: which subjects are measured, and what a bundle finds beyond the free baselines on the same volumes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

SHAPE = (24, 30, 26)


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("measure_sites")


def brain():
    axes = np.indices(SHAPE) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    return torch.from_numpy(np.sqrt(((axes / np.array([11, 14, 12]).reshape(3, 1, 1, 1)) ** 2).sum(axis=0)) < 1)[None]


def volume(seed, has_lesion):
    """Noise that is darker in a cube which only the map of the network shows fully."""
    inside, lesion = brain(), torch.zeros((1, *SHAPE), dtype=torch.bool)
    lesion[:, 6:10, 12:17, 11:15] = has_lesion
    noise = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(seed))
    image = (0.5 + 0.1 * noise - 0.05 * lesion) * inside
    about = {"brain": inside, "lesion": lesion}
    network = {"map": (0.01 * noise + lesion) * inside, "change": 0.1 * lesion.float(), **about}
    return network, {"map": image, "change": torch.zeros_like(image), **about}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """The CSV, and the folder of maps, of two sites with two healthy subjects each and two to test."""
    folder = tmp_path_factory.mktemp("sites")
    rows = ["subject,site,split,T1,lesion"]
    (folder / "scan.nii.gz").touch()
    for number, site in enumerate(("ixi", "novosibirsk")):
        for subject in range(4):
            for kind in ("", "-chronic_stroke") if subject > 1 else ("",):
                name, has_lesion = f"{site}{subject}{kind}", bool(kind)
                split = "test" if subject > 1 else "val"
                rows.append(f"{name},{site},{split},scan.nii.gz,{'scan.nii.gz' if has_lesion else ''}")
                for key, tensors in zip(("mad_ad", "images"), volume(10 * number + subject, has_lesion), strict=True):
                    (folder / "maps" / key).mkdir(parents=True, exist_ok=True)
                    torch.save(tensors, folder / "maps" / key / f"{name}.pt")
    (folder / "cohort.csv").write_text("\n".join(rows))
    return folder / "cohort.csv"


def measured(script, cohort, method, first=None):
    output = cohort.with_name(f"{method}.json")
    script.main(cohort, method, output, maps=cohort.with_name("maps"), first=first)
    return json.loads(output.read_text(encoding="utf-8"))


def test_a_bundle_is_compared_with_the_baselines_on_the_same_volumes(script, cohort):
    result = measured(script, cohort, "mad_ad")
    assert result["tested"] == {"ixi": ["ixi2", "ixi3"], "novosibirsk": ["novosibirsk2", "novosibirsk3"]}
    assert (result["calibrated_on"], result["shipped"]) == (4, script.RAW)
    for site, row in result["variants"][script.RAW].items():
        assert row["auprc_strokes"]["value"] == 1
        for key in script.BASELINES:
            baseline = measured(script, cohort, key)["variants"][script.RAW][site]["auprc_strokes"]["value"]
            difference = row[f"auprc_strokes_minus_{key}"]
            assert 0 < baseline < 0.99
            assert difference["value"] == pytest.approx(1 - baseline)
            assert 0 < difference["ci95"][0] <= difference["value"] + 1e-9


def test_only_the_first_subjects_are_measured_where_so_many_are_asked_for(script, cohort):
    result = measured(script, cohort, "darkness_minus_atlas", first=1)
    assert result["tested"] == {"ixi": ["ixi2"], "novosibirsk": ["novosibirsk2"]}
    assert result["weights_sha256"] is None
    assert not [key for key in result["variants"][script.RAW]["ixi"] if "minus" in key]
