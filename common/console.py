"""How the commands of `uad` speak: errors in one line each, with what the reader can do here; -v, -q and --log."""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import OutputError, UADError, settings_said_as
from .outputs import Inputs, check_file
from .progress import quiet as without_progress

FAILED = 3  # the exit code where an input is to blame
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OUR_LOG = re.compile(rb"\d{4}-\d\d-\d\d [\d:,]+ INFO uad: ")  # how one begins
SPEECH = ("verbose", "quiet", "log")

logger = logging.getLogger("uad")
logger.addHandler(logging.NullHandler())

_LOGGED: ContextVar[bool] = ContextVar("logged", default=False)
_BEFORE: ContextVar[Mapping[str, Any] | None] = ContextVar("before", default=None)  # options before the command


def _speech(
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say what MONAI says too, and where errors arose.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress; errors are said all the same.")] = False,
    log: Annotated[
        Path | None, typer.Option("--log", help="File to which all of that is added, with the time.")
    ] = None,
) -> None:
    """The options that every command has, and that may stand before it too."""


class SpeakingGroup(TyperGroup):
    """A group that has the options of `_speech`, as each of its commands has; a log after the command counts."""

    def __init__(self, *, commands: Any = None, **attributes: Any) -> None:
        for command in (commands or {}).values():
            if not isinstance(command, TyperGroup):
                command.params = [*command.params, *_speech_options()]
                command.callback = _speaking(command.name, command.callback)
        super().__init__(commands=commands, **attributes)
        self.params = [*self.params, *_speech_options()]

    def invoke(self, ctx: Any) -> Any:
        """Run the command with what was said before it."""
        before = _BEFORE.set({word: ctx.params.pop(word) for word in SPEECH})
        try:
            return super().invoke(ctx)
        finally:
            _BEFORE.reset(before)


def _speech_options() -> list[Any]:
    alone = typer.Typer(add_completion=False)
    alone.command()(_speech)
    return list(typer.main.get_command(alone).params)


def _speaking(name: str, command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def wrapped(**options: Any) -> Any:
        before = _BEFORE.get() or {}
        verbose, quiet, log = (options.pop(word, None) or before.get(word) for word in SPEECH)
        with one_line_errors():
            handlers = _handlers(bool(verbose), log, options)
        with _logged_by(handlers), without_progress(bool(quiet)):
            logger.info("uad %s %s: %s", __version__, name, options)
            return command(**options)

    return wrapped


def _handlers(verbose: bool, log: Path | None, options: Mapping[str, Any]) -> list[logging.Handler]:
    """Raises OutputError where the log is no place for one."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if verbose else []
    if log is not None:
        given = [
            value if isinstance(value, (list, tuple)) else [value]
            for name, value in options.items()
            if name != "output"
        ]
        Inputs(path for paths in given for path in paths if isinstance(path, Path)).check([log])
        check_file(log, _is_log(log), "a log of uad")
        try:
            handlers.append(logging.FileHandler(log, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise OutputError(log, f"cannot be written ({error.strerror or error})", "choose another place") from error
    return handlers


def _is_log(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(100)
    return not start or OUR_LOG.match(start) is not None


@contextmanager
def _logged_by(handlers: list[logging.Handler]) -> Iterator[None]:
    level, before = logging.root.level, _LOGGED.set(bool(handlers))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO if handlers else level)
    try:
        yield
    finally:
        logging.root.setLevel(level)
        _LOGGED.reset(before)
        for handler in handlers:
            logging.root.removeHandler(handler)
            handler.close()


def advise_options(context: typer.Context) -> None:
    """What an error advises are options of the command that runs, and no others."""
    command = context.command.commands[context.invoked_subcommand]  # type: ignore[attr-defined]
    options = (parameter for parameter in command.params if parameter.param_type_name == "option")
    words = {option.name: f"give {option.opts[-1]}{'' if option.is_flag else ' {}'}" for option in options}
    context.with_resource(settings_said_as(words))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print the UADError that the block ends with, also one that MONAI has wrapped, and exit with `FAILED`.

    What MONAI and ignite say of it is said only where it was asked for, with -v or --log.
    """
    before = logging.root.manager.disable
    if not _LOGGED.get():
        logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:
        from .images.check import root_cause

        cause = root_cause(error)
        if not isinstance(cause, UADError):
            if not isinstance(error, typer.Exit):
                logger.error("failed", exc_info=error)
            raise
        logger.error("%s: %s", type(cause).__name__, cause, exc_info=error)
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    finally:
        logging.disable(before)
