"""The command that draws a method's stages on a slice of a scan."""

from __future__ import annotations

import pytest
from PIL import Image
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.table import SAMPLE_DIR
from common.workflows import figures

SAMPLE = SAMPLE_DIR / "mni152_lesions_T1.nii.gz"


def draw(*arguments):
    return CliRunner().invoke(app, ["figures", *map(str, arguments)])


def test_a_picture_of_the_sample(tmp_path, monkeypatch):
    titles, save = [], figures.save_stages
    monkeypatch.setattr(figures, "save_stages", lambda *given: (titles.append(given[2]), save(*given)))
    output = tmp_path / "dae.png"
    done = draw("dae", SAMPLE, "-o", output)
    assert done.exit_code == 0, done.output
    assert f"{output}: the picture" in done.output
    assert titles == ["dae: mni152_lesions_T1, slice 39 (z = 6 mm)"]  # 6.5, as in the file
    with Image.open(output) as picture:
        assert picture.width > picture.height
    first = output.read_bytes()
    assert draw("dae", SAMPLE, "-o", output).exit_code == 0  # an earlier picture is written over
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slice", "500"], "slice 500 shows nothing; choose one of"),
        (["--set", "nothing=1"], "nothing: the bundle's configs have no such item"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(options, message, tmp_path):
    done = draw("dae", SAMPLE, "-o", tmp_path / "a.png", "--set", "preprocessing::canvas=96", *options)
    assert done.exit_code == 3
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_other_file_is_written_over(tmp_path):
    (tmp_path / "notes.png").write_text("mine", encoding="utf-8")
    done = draw("dae", SAMPLE, "-o", tmp_path / "notes.png")
    assert done.exit_code == 3
    assert "is not an earlier picture" in done.stderr
    assert (tmp_path / "notes.png").read_text(encoding="utf-8") == "mine"
