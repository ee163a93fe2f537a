"""Every kind of cohort is a command, and none writes into the images that it reads."""

from __future__ import annotations

import inspect

import pytest
from typer.testing import CliRunner

from common.cli import app
from common.cohorts.kinds import KINDS, _links, _reading_only
from common.errors import OutputError


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_a_command_with_its_own_options(kind):
    done = CliRunner().invoke(app, ["cohort", kind, "--help"], terminal_width=200)
    assert done.exit_code == 0, done.output
    assert {"data_dir", "output"} <= inspect.signature(KINDS[kind]).parameters.keys()


@pytest.fixture
def made():
    """What a cohort was made of, by a kind that only takes notes."""
    calls = []

    def make(data_dir, output, seed=0):
        """Write a cohort."""
        calls.append((data_dir, output, seed))

    return _reading_only(make), calls


def test_other_folder_is_written(made, tmp_path):
    make, calls = made
    (tmp_path / "data").mkdir()
    make(tmp_path / "data", tmp_path / "out", seed=3)
    assert calls == [(tmp_path / "data", tmp_path / "out", 3)]
    assert make.__doc__ == "Write a cohort."


def test_folder_of_the_images_is_not(made, tmp_path):
    make, calls = made
    (tmp_path / "data").mkdir()
    for output in (tmp_path / "data", tmp_path / "data" / "out"):
        with pytest.raises(OutputError):
            make(tmp_path / "data", output)
    assert calls == []


def test_what_is_linked_from_the_images_is_read_too(made, tmp_path):
    """The output holds the file that a link in a subfolder of the images leads to."""
    make, calls = made
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scan.nii.gz").write_bytes(b"scan")
    link = tmp_path / "data" / "deep" / "scan.nii.gz"
    link.symlink_to(tmp_path / "out" / "scan.nii.gz")
    assert _links(tmp_path / "data") == [link]
    with pytest.raises(OutputError):
        make(tmp_path / "data", tmp_path / "out")
    assert calls == []
