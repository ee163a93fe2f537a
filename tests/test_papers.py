"""The verbs about the papers stand in the command, with their help."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from common.cli import app


@pytest.mark.parametrize(
    ("verb", "options"), [("reproduce", ("--data", "--networks", "--dry-run")), ("figures", ("--slice",))]
)
def test_verbs_have_their_options(verb, options):
    done = CliRunner().invoke(app, [verb, "--help"], terminal_width=200)
    assert done.exit_code == 0, done.output
    assert all(option in done.output for option in options)


def test_a_bundle_that_there_is_not(tmp_path):
    done = CliRunner().invoke(app, ["figures", "nothing", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "a.png")])
    assert done.exit_code == 3
    assert "no such bundle; choose one of" in done.stderr
