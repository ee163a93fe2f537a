"""How far a long computation is, on stderr: a bar on a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from typing import Any, TypeVar

T = TypeVar("T")
Part = TypeVar("Part", bound=Sized)

STEP_S = 10.0  # between lines about one case
CASE_S = 1.0  # between lines about the cases

_SHOWN: ContextVar[Progress | None] = ContextVar("shown", default=None)
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """No progress is shown in the block."""
    before = _QUIET.set(is_quiet)
    try:
        yield
    finally:
        _QUIET.reset(before)


def inside(parts: Sequence[Part], unit: str = "slices") -> Iterator[Part]:
    """The parts of a case one by one, told to the progress that is shown, if one is; a part counts by its length."""
    progress, total, done = _SHOWN.get(), sum(map(len, parts)), 0
    for part in parts:
        yield part
        done += len(part)
        if progress is not None:
            progress.step(done, total, unit)


class Progress:
    """Cases that are done, of how many, and how far the present one is. Use it as a context manager.

    Of a single case no line is said when it is done: the command says so itself.

    Args:
        total: number of cases.
        unit: what one is called.
        clock: seconds, for tests.
    """

    def __init__(self, total: int, unit: str = "case", clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.unit, self.clock = total, unit, clock
        self.done, self.name = 0, ""
        self._bar: Any = None
        self._token: Token[Progress | None] | None = None
        self._started = self._said = self._stepped = clock()

    def __enter__(self) -> Progress:
        if not _QUIET.get():
            self._token = _SHOWN.set(self)
            if sys.stderr.isatty():
                from tqdm import tqdm

                self._bar = tqdm(total=self.total, unit=self.unit)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _SHOWN.reset(self._token)
            self._token = None
        if self._bar is not None:
            self._bar.close()

    def each(self, items: Iterable[T], name: Callable[[T], str] = str) -> Iterator[T]:
        """The items one by one, each as a case."""
        for item in items:
            self.begin(name(item))
            yield item
            self.end()

    def begin(self, name: str) -> None:
        """The next case has begun."""
        self.name, self._stepped = name, self.clock()

    def step(self, done: int, total: int, unit: str) -> None:
        """So much of the present case is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.name}: {done}/{total} {unit}")
        elif self.clock() - self._stepped >= STEP_S:
            self._stepped = self.clock()
            self._say(f"{self.name}: {done} of {total} {unit}")

    def end(self) -> None:
        """The present case is done."""
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.update()
        elif self.total > 1 and (self.done == self.total or self.clock() - self._said >= CASE_S):
            self._said = self.clock()
            seconds = self._said - self._started
            left = seconds / self.done * (self.total - self.done)
            self._say(f"{self.done} of {self.total} {self.unit}s in {seconds:.0f} s, about {left:.0f} s left")

    def _say(self, line: str) -> None:
        """A stderr that is closed, or that lacks a letter of a name, stops nothing."""
        if self._token is not None:
            with suppress(OSError, ValueError):
                print(line.encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)
