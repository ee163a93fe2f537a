import csv

import nibabel as nib
import numpy as np
from PIL import Image
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.table import read_cohort


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_patients_are_in_one_split(oct2017):
    _, out = oct2017
    split = {row["subject"]: row["split"] for row in rows_of(out / "cohort.csv")}
    patients = {name: set() for name in ("train", "val", "test")}
    for row in rows_of(out / "slices.csv"):
        patients[split[row["subject"]]].add(row["name"].split("-")[1])
    assert patients["test"] == {"100", "101"}
    assert len(patients["val"]) == 2  # 5 % of the 37 that do not test
    assert len(patients["train"]) == 35
    assert not patients["val"] & patients["train"]


def test_stacks_are_the_resized_images(oct2017):
    data, out = oct2017
    files = {path.name: path for path in data.rglob("*.jpeg")}
    for row in rows_of(out / "slices.csv")[::9]:
        stack = nib.load(out / f"{row['subject']}.nii.gz")
        assert stack.shape[:2] == (256, 256)
        assert stack.get_data_dtype() == np.uint8
        with Image.open(files[row["name"]]) as image:
            expected = np.asarray(image.convert("L").resize((256, 256), Image.Resampling.BICUBIC))
        assert np.array_equal(np.asarray(stack.dataobj)[..., int(row["slice"])], expected.T)


def test_only_diseased_stacks_have_a_lesion_and_it_is_all_of_them(oct2017):
    _, out = oct2017
    for row in rows_of(out / "cohort.csv"):
        assert bool(row["lesion"]) == ("drusen" in row["subject"])
        if row["lesion"]:
            assert np.all(np.asarray(nib.load(out / row["lesion"]).dataobj) == 1)
    assert all("lesion" not in item for item in read_cohort(out / "cohort.csv", ["OCT"], "train"))
    assert len(read_cohort(out / "cohort.csv", ["OCT"], "test")) == 2


def test_a_folder_that_is_not_the_data_set(tmp_path):
    done = CliRunner().invoke(app, ["cohort", "oct", str(tmp_path), "-o", str(tmp_path.with_suffix(".out"))])
    assert done.exit_code != 0
    assert "no images in train/NORMAL" in done.stderr
