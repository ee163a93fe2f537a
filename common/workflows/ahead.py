"""One thing is made ahead, in a thread, while the one before it is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import TypeVar

T = TypeVar("T")


def one_ahead(made: Iterator[T], discard: Callable[[T], object]) -> Generator[T, None, None]:
    """What an iterator makes, in its order; the next one is made in a thread while the caller is at the present one.

    The thread has the caller's context, and one thing at a time, of which no second one is made before the first is
    taken. What making one raises is raised when its turn comes. However the caller ends, the thread has ended before.

    made: gives no None.
    discard: is called with what was made and is not taken any more.
    """
    with ThreadPoolExecutor(1, "ahead") as thread:
        make = partial(copy_context().run, next, made, None)
        coming = thread.submit(make)
        try:
            while (one := coming.result()) is not None:
                coming = thread.submit(make)
                yield one
        finally:
            wait([coming])
            if coming.exception() is None and (left := coming.result()) is not None:
                discard(left)
