"""How the commands of `uad` speak: errors in one line each, with what the reader can do in this command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .errors import UADError, settings_said_as

FAILED = 3  # the exit code where an input is to blame


def advise_options(context: typer.Context) -> None:
    """What an error advises are options of the command that runs, and no others."""
    command = context.command.commands[context.invoked_subcommand]  # type: ignore[attr-defined]
    options = (parameter for parameter in command.params if parameter.param_type_name == "option")
    words = {option.name: f"give {option.opts[-1]}{'' if option.is_flag else ' {}'}" for option in options}
    context.with_resource(settings_said_as(words))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print the UADError that the block ends with, also one that MONAI has wrapped, and exit with `FAILED`."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what MONAI and ignite say of a failed case is said once, here
    try:
        yield
    except Exception as error:
        from .images.check import root_cause

        cause = root_cause(error)
        if not isinstance(cause, UADError):
            raise
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    finally:
        logging.disable(before)
