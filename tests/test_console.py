"""What a command says, and with which exit code it ends."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from common.console import FAILED, SpeakingGroup, one_line_errors
from common.errors import BundleError
from common.progress import Progress


def test_a_typed_error_is_one_line_and_an_exit_code(capsys):
    with pytest.raises(typer.Exit) as end, one_line_errors():
        raise BundleError("dae", "no\nweights", "train it")
    assert end.value.exit_code == FAILED
    assert capsys.readouterr().err == "BundleError: dae: no weights; train it\n"


def test_so_is_one_that_others_have_wrapped(capsys):
    with pytest.raises(typer.Exit), one_line_errors():
        try:
            raise BundleError("dae", "no weights", "train it")
        except BundleError as error:
            raise RuntimeError("applying transform") from error
    assert capsys.readouterr().err.startswith("BundleError: dae")


@pytest.mark.parametrize("error", [KeyError("a"), typer.Exit(4), KeyboardInterrupt()])
def test_other_errors_pass(error, capsys):
    before = logging.root.manager.disable
    with pytest.raises(type(error)), one_line_errors():
        raise error
    assert logging.root.manager.disable == before
    assert capsys.readouterr().err == ""


@pytest.fixture
def speaking():
    """A program of one command, which fails or says something in the log."""
    program = typer.Typer(cls=SpeakingGroup)

    @program.callback()
    def main():
        """A group, as `uad` is."""

    @program.command()
    def work(path: Path, output: Path = Path("out"), fail: bool = False):
        with one_line_errors(), Progress(2, clock=iter(range(0, 1000, 5)).__next__) as progress:
            for _ in progress.each("ab"):
                logging.getLogger("monai").info("what MONAI says")
            if fail:
                raise BundleError("dae", "no weights", "train it")

    def run(*arguments, before=()):
        return CliRunner().invoke(program, [*map(str, before), "work", *map(str, arguments)])

    return run


def test_progress_is_said_unless_quiet(speaking, tmp_path):
    lines = speaking(tmp_path / "a").stderr.splitlines()
    assert [line.partition(" in ")[0] for line in lines] == ["1 of 2 cases", "2 of 2 cases"]
    assert speaking(tmp_path / "a", "-q").stderr == ""
    failed = speaking(tmp_path / "a", "-q", "--fail")
    assert (failed.exit_code, failed.stderr) == (FAILED, "BundleError: dae: no weights; train it\n")


def test_verbose_says_what_others_say_and_where_an_error_arose(speaking, tmp_path):
    said = speaking(tmp_path / "a", "-v", "--fail").stderr
    assert "INFO monai: what MONAI says" in said
    assert "Traceback" in said
    assert said.endswith("BundleError: dae: no weights; train it\n")


def test_log_holds_it_and_the_next_run_adds_to_it(speaking, tmp_path):
    log = tmp_path / "uad.log"
    failed = speaking(tmp_path / "a", "--log", log, "--fail")
    assert "Traceback" not in failed.stderr
    first = log.read_text(encoding="utf-8")
    assert all(words in first for words in ("INFO uad: uad ", "what MONAI says", "Traceback", "BundleError: dae"))
    assert speaking(tmp_path / "a", "--log", log).exit_code == 0
    assert log.read_text(encoding="utf-8").startswith(first)
    assert str(log) not in [getattr(handler, "baseFilename", None) for handler in logging.root.handlers]


def test_what_is_said_before_the_command_counts_too(speaking, tmp_path):
    log, other = tmp_path / "uad.log", tmp_path / "other.log"
    assert speaking(tmp_path / "a", before=["-q"]).stderr == ""
    assert "Traceback" in speaking(tmp_path / "a", "--fail", before=["-v", "--log", log]).stderr
    assert "BundleError: dae" in log.read_text(encoding="utf-8")
    assert speaking(tmp_path / "a", "--log", other, before=["--log", log]).exit_code == 0
    assert "Traceback" not in other.read_text(encoding="utf-8")
    assert speaking(tmp_path / "a").stderr != ""  # the next command is as it was


@pytest.mark.parametrize("place", ["scan.nii.gz", "scans/uad.log", "none/uad.log", "scans"])
def test_a_log_is_written_over_nothing_else(place, speaking, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"voxels")
    (tmp_path / "scans").mkdir()
    done = speaking(tmp_path / "scans", "--log", tmp_path / place)
    assert (done.exit_code, done.stderr.count("\n")) == (FAILED, 1)
    assert done.stderr.startswith("OutputError: ")
    assert (tmp_path / "scan.nii.gz").read_bytes() == b"voxels"
    assert not list((tmp_path / "scans").iterdir())
