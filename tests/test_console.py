"""What a command says, and with which exit code it ends."""

from __future__ import annotations

import logging

import pytest
import typer

from common.console import FAILED, one_line_errors
from common.errors import BundleError


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
