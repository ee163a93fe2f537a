"""The papers' tables: what a plan says, what is made once, and, slowly, each of them on made-up data in small."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.headct_sprites import SPLIT
from common.cohorts.healthy import FASTMRI_LABELS, UKB_IMAGE, UKB_LESION
from common.errors import CohortError, OutputError
from common.workflows import reproduce as module
from common.workflows.recipes import Networks, recipe, recipes
from common.workflows.reproduce import Reproduction, markdown, number, reproduce, steps

STEP = {"max_epochs": 1, "epoch_length": 1, "batch_size": 2}
SMALL = STEP | {
    "preprocessing::canvas": 48,
    "preprocessing::brain_volume_ml": [5, 2300],
    "num_inference_steps": 1,
    "num_passes": 1,
    "num_seeds": 1,
    "num_kl_timesteps": 2,
    "num_healing_steps": 2,
    "num_score_timesteps": 2,
    "num_orderings": 1,
    "depth": 1,
    "probability": 0.01,  # untrained transformers find many codes unlikely
}


def plan(name, tmp_path, networks=Networks.COMPACT, **items):
    return Reproduction(name, tmp_path / "data", tmp_path / "out", networks, items=items)


def folders(name, tmp_path):
    for folder in recipe(name).folders:
        (tmp_path / "data" / folder).mkdir(parents=True)


# --- plans ---


def test_steps_say_everything_and_the_hours(tmp_path):
    lines = steps(plan("madad-s1", tmp_path, Networks.PAPER))
    assert f"data: {tmp_path / 'data' / 'ATLAS_2'}" in lines
    assert "prepare: 1.0 mm, in MNI152" in lines
    assert "train: mad_ad (mad_ad): train.json + paper.json, about 60 h on a GPU" in lines
    assert "measure: THOR" in lines
    assert lines[-1] == f"about {recipe('madad-s1').gpu_hours:g} h on a GPU in all, a rough estimate"
    assert not any(" h on" in line for line in steps(plan("madad-s1", tmp_path)))


def test_command_lists_and_plans_and_writes_nothing(tmp_path):
    done = CliRunner().invoke(app, ["reproduce", "--list"])
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == list(recipes())
    out = str(tmp_path / "out")
    done = CliRunner().invoke(app, ["reproduce", "madad-s2", "--data", str(tmp_path), "-o", out, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "train: mad_ad (FLAIR): train.json + paper.json" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["madad-s2"], "--data or -o is missing"),
        (["madad-s9", "--data", "d", "-o", "o"], "madad-s9: no such table; choose one of berdiff-table1"),
        (["madad-s2", "--data", "d", "-o", "o"], "d: no such folder; expected in it: BraTS2021"),
        (["madad-s2", "--data", "d", "-o", "o", "--set", "nothing=1"], "nothing: no config of madad-s2"),
        (["madad-s2", "--data", "d", "-o", "o", "--networks", "shipped"], "mad_ad ships, for T1, do not fit"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["reproduce", *arguments])
    assert done.exit_code == 3
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_set_is_named_with_what_is_expected(tmp_path):
    (tmp_path / "data" / "IXI").mkdir(parents=True)
    with pytest.raises(CohortError, match=r"ATLAS_2: no such folder; expected in it: IXI, ATLAS_2; see docs/data\.md"):
        reproduce(plan("madad-s1", tmp_path))


def test_no_output_in_the_data_nor_over_another_file(tmp_path):
    folders("madad-s1", tmp_path)
    with pytest.raises(OutputError):
        reproduce(dataclasses.replace(plan("madad-s1", tmp_path), output=tmp_path / "data" / "IXI"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "madad-s1.md").write_text("my notes\n", encoding="utf-8")
    with pytest.raises(OutputError, match="is not an earlier table"):
        reproduce(plan("madad-s1", tmp_path))


def test_table_has_our_rows_and_the_papers():
    one = recipe("madad-table4")
    text = markdown(one, {name: [1.23, None, 3.0, 4.0, 5.0] for name in one.rows})
    assert text.splitlines()[0] == "| | T1 | T1CE | T2 | FLAIR | mean |"
    assert "| 2 steps | 1.2 | - | 3.0 | 4.0 | 5.0 |" in text
    assert "| paper: 2 steps | - | - | - | - | 69 |" in text
    assert len(text.splitlines()) == 2 + 2 * len(one.rows)


def test_a_number_is_found_by_its_path(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"a": {"b": 0.5, "c": None}}), encoding="utf-8")
    assert number(path, "a::b") == 0.5
    assert number(path, "a::c::d") is None
    with pytest.raises(Exception, match="no a::x in the result"):
        number(path, "a::x")


# --- what is made once ---


@pytest.fixture
def notes(monkeypatch):
    """Trainings and evaluations that only take notes, and write what is asked for next."""
    found = []

    def run_training(name, cohort, output_dir, overlays, items):
        found.append(("train", name, items.get("modalities"), tuple(overlays)))
        output_dir.mkdir(parents=True)
        (output_dir / "model.pt").touch()

    def run_inference(name, configs, **items):
        path = items["result"]
        found.append(("measure", name, items.get("network_def::detector::map_kind")))
        value = len(found) / 100
        result = {"protocols": {"mad_ad_s2": {"max_dice": value}}}
        Path(path).write_text(json.dumps(result), encoding="utf-8")

    monkeypatch.setattr(module, "run_training", run_training)
    monkeypatch.setattr(module, "run_inference", run_inference)
    return found


def brats(folder, write_patient, count=3):
    """Patients as BraTS unpacks, in small."""
    for number_ in range(1, count + 1):
        name = f"BraTS_{number_:05d}"
        write_patient(folder / name / name, ("flair", "t1", "t1ce", "t2"), 155, range(85, 100 + number_))


def test_tables_share_networks_and_go_on_where_they_stopped(notes, tmp_path, write_patient, monkeypatch):
    brats(tmp_path / "data" / "BraTS2021", write_patient)
    path = reproduce(plan("madad-s2", tmp_path, Networks.PAPER))
    assert [note for note in notes if note[0] == "train"] == [
        ("train", "mad_ad", [modality], ("paper.json",)) for modality in ("FLAIR", "T1CE", "T2", "T1")
    ]
    assert path.read_text(encoding="utf-8").startswith("# Beizaee et al., IPMI 2025, Table 2")
    assert "| MAD-AD | 2.0 | 4.0 | 6.0 | 8.0 |" in path.read_text(encoding="utf-8")
    assert "done" in " ".join(steps(plan("madad-s2", tmp_path, Networks.PAPER)))
    reproduce(plan("madad-s2", tmp_path, Networks.PAPER))
    assert len(notes) == 8
    reproduce(plan("madad-table3", tmp_path, Networks.PAPER))
    assert [note for note in notes[8:] if note[0] == "train"] == []
    assert [note[2] for note in notes[8:]] == ["mask"] * 4 + ["latent"] * 4 + ["image"] * 4
    reproduce(plan("madad-s2", tmp_path))  # compact networks are others
    assert [note for note in notes[20:] if note[0] == "train"] == [
        ("train", "mad_ad", [modality], ()) for modality in ("FLAIR", "T1CE", "T2", "T1")
    ]


# --- all of them, in small ---


@pytest.fixture
def write_brains(phantom, save_nifti):
    """Brains of 4 mm voxels and their lesions, by the names of their files."""

    def write(files, modality="T1", scale=1.0, whole_head=False):
        """files: by "image", "lesion", "brain" the path."""
        person = dataclasses.replace(phantom, scale=scale, lesion="lesion" in files)
        shape, affine = person.grid((4.0, 4.0, 4.0), margin_mm=16.0 if whole_head else 8.0)
        image = person.of_modality(modality, shape, affine, whole_head)
        _, brain, lesion = person.on_grid(shape, affine)
        volumes = {"image": image, "lesion": lesion.astype(np.uint8), "brain": brain.astype(np.uint8)}
        for name, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_nifti(path, volumes[name], affine)

    return write


def ixi(data, write):
    for n in range(3):
        write({"image": data / f"IXI{n:03d}-HH-{n:04d}-T1.nii.gz"}, scale=1 - n / 50)


def atlas(data, write):
    for n in range(2):
        stem = data / "Training" / f"sub-{n}" / f"sub-{n}_space-MNI152"
        files = {"image": "_T1w.nii.gz", "lesion": "_label-L_desc-T1lesion_mask.nii.gz"}
        write({name: stem.with_name(stem.name + end) for name, end in files.items()}, scale=1 - n / 50)


def fastmri(data, write):
    (data / FASTMRI_LABELS).parent.mkdir(parents=True)
    names = [f"file_brain_AXT1_{n}" for n in range(3)]
    (data / FASTMRI_LABELS).write_text(
        "\n".join(["file,label", *(f"{n},Normal for age" for n in names)]), encoding="utf-8"
    )
    for number_, name in enumerate(names):
        write({"image": data / f"{name}.nii.gz"}, scale=0.9 - number_ / 50)


def ukb(data, write):
    for n in range(4):
        person = data / f"{1000 + n}_20253_2_0"
        write({"image": person / UKB_IMAGE, "lesion": person / UKB_LESION}, "FLAIR", 1 - n / 50)


def mslub(data, write):
    for part in ("T1W", "T2W"):
        write({"image": data / "patient01" / f"{part}.nii.gz"})
    files = {"image": "FLAIR", "brain": "brainmask", "lesion": "consensus_gt"}
    write({name: data / "patient01" / f"{part}.nii.gz" for name, part in files.items()}, "FLAIR")


def wmh(data, write):
    write({"image": data / "Utrecht" / "0" / "pre" / "T1.nii.gz"})
    write(
        {"image": data / "Utrecht" / "0" / "pre" / "FLAIR.nii.gz", "lesion": data / "Utrecht" / "0" / "wmh.nii.gz"},
        "FLAIR",
    )


def brats_brains(data, write):
    for part in ("t1", "t1ce", "t2"):
        write({"image": data / "B1" / f"B1_{part}.nii.gz"})
    write({"image": data / "B1" / "B1_flair.nii.gz", "lesion": data / "B1" / "B1_seg.nii.gz"}, "FLAIR")


def ct(data, write):
    for n in range(4):
        files = {"image": data / f"p{n}" / "CT.nii.gz"}
        write(
            files | ({"lesion": data / f"p{n}" / "lesion.nii.gz"} if n == 3 else {}), "CT", 1 - n / 50, whole_head=True
        )


def headct(data, write):
    with SPLIT.open(newline="", encoding="utf-8") as file:
        kept = [row["name"] for row in csv.DictReader(file)]  # 100 that validate, then those that test
    names = [*(f"other{n:02d}.jpeg" for n in range(10)), *kept[:10], *kept[100:220]]
    inside = np.hypot(*(np.indices((64, 64)) - 31.5)) < 20
    noise = np.random.default_rng(0).integers(0, 90, (len(names), 64, 64))
    data.mkdir(parents=True)
    np.savez(data / "headct_64.npz", images=np.where(inside, 60 + noise, 25).astype(np.uint8), names=np.array(names))


WRITE = {
    **{"IXI": ixi, "ATLAS_2": atlas, "fastMRI": fastmri, "UKB": ukb, "MSLUB": mslub, "WMH": wmh, "HeadCT": headct},
    **dict.fromkeys(("CROMIS", "KCH", "CHRONIC"), ct),
}


BUNDLES_OF_SPRITES = ("ae_headct", "vae_headct", "f_anogan_headct", "ar_transformer_headct", "latent_ddpm_headct")


def test_rows_of_sprites_are_kept_one_by_one_and_made_anew_with_other_weights(tmp_path, monkeypatch):
    """A run that is stopped goes on; the score of the latent DDPM is measured once, for the variant of the paper's."""
    headct(tmp_path / "data" / "HeadCT", None)
    measured, stop = [], []

    class Sprites:
        @staticmethod
        def measure(variant, cohorts, device, with_score=True):
            if variant.items[-1] in stop:
                raise KeyboardInterrupt
            measured.append((*variant.items[1:], with_score))
            return {"name": variant.name}

        @staticmethod
        def record(cohorts, rows, device):
            return {"cohorts": len(cohorts), "rows": rows}

        @staticmethod
        def table(rows):
            return "\n".join(row["name"] for row in rows)

    places = {key: tmp_path / f"{key}.pt" for key in BUNDLES_OF_SPRITES}
    for place in places.values():
        torch.save({"calibration.threshold": torch.ones(())}, place)
    monkeypatch.setattr(module, "script", lambda _: Sprites)
    monkeypatch.setattr(module, "weights_of", places.__getitem__)
    plan = Reproduction("pinaya-table1", tmp_path / "data", tmp_path / "out", Networks.SHIPPED)
    stop.append("variant=b")
    with pytest.raises(KeyboardInterrupt):
        reproduce(plan)
    assert measured == [(True,), (True,), (True,), ("num_orderings=1", True), (True,), ("variant=a", False)]
    stop.clear()
    text = reproduce(plan).read_text(encoding="utf-8")
    assert measured[6:] == [("variant=b", False), ("variant=c", True), ("variant=d", False)]
    assert json.loads((tmp_path / "out" / "pinaya-table1.json").read_text(encoding="utf-8"))["cohorts"] == 3
    assert reproduce(plan).read_text(encoding="utf-8") == text and len(measured) == 9
    torch.save({"calibration.threshold": torch.zeros(())}, places["vae_headct"])
    reproduce(plan)
    assert measured[9:] == [(True,)]


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes())
def test_table_is_made_of_made_up_data(name, tmp_path, write_brains, write_patient, monkeypatch):
    """Compact networks after one step of training; brains of 4 mm in their own space."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # MONAI adds the bundles' folders
    one = recipe(name)
    for folder in one.folders:
        if folder in WRITE:
            WRITE[folder](tmp_path / "data" / folder, write_brains)
        elif name == "pinaya-table2":
            brats_brains(tmp_path / "data" / folder, write_brains)
        else:
            brats(tmp_path / "data" / folder, write_patient)
    quick = {} if one.prepare is None else {"prepare": {"spacing_mm": 4.0, "register": False}}
    mask = {"network_def::detector::map_kind": "mask"}  # an untrained MAD-AD changes nothing: all other maps are 0
    quick["trainings"] = {
        key: dataclasses.replace(t, compact={**t.compact, **mask}) if t.bundle == "mad_ad" else t
        for key, t in one.trainings.items()
    }
    quick |= {} if one.sprites is None else {"sprites": {**one.sprites, "seeds": [0, 1]}}
    monkeypatch.setattr(module, "recipe", lambda _: dataclasses.replace(one, **quick))
    is_brain = "preprocessing::spacing_mm" in items_of(one)
    sizes = {"preprocessing::spacing_mm": 1.0 if "BraTS2021" in one.folders or name == "berdiff-table1" else 4.0}
    sizes = sizes if is_brain else {"preprocessing::size": 64}
    items = {item: value for item, value in {**SMALL, **sizes}.items() if item in items_of(one)}
    small = Reproduction(name, tmp_path / "data", tmp_path / "out", Networks.COMPACT, items=items)
    text = reproduce(small).read_text(encoding="utf-8")
    for row in (*one.rows, *(f"paper: {row}" for row in one.printed)) if one.sprites is None else ():
        assert f"| {row} | " in text
    ours = [line for line in text.splitlines() if line.startswith("| ") and "paper: " not in line][1:]
    assert len(ours) >= len(one.rows)
    assert all(re.search(r"\d\.\d", line) for line in ours)
    assert one.curve is None or (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    monkeypatch.setattr(module, "run_training", None)
    monkeypatch.setattr(module, "run_inference", None)
    assert reproduce(small).read_text(encoding="utf-8") == text


def items_of(one):
    """All items that some config of a recipe has; the volume of a brain is one of brains."""
    known = [*SMALL, "preprocessing::spacing_mm", "preprocessing::size"]
    found = set()
    for training in one.trainings.values():
        parser = module.ConfigParser()
        parser.read_config(str(module.BUNDLES_DIR / training.bundle / "configs" / "train.json"))
        found |= {item for item in known if item in parser}
        found |= {"preprocessing::brain_volume_ml"} if "preprocessing::spacing_mm" in parser else set()
    return found
