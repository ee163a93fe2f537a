"""One thing is made ahead, in a thread, while the one before it is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def one_ahead(made: Iterator[T], discard: Callable[[T], object]) -> Generator[T, None, None]:
    """What an iterator makes, in its order; the next one is made in a thread while the caller is at the present one.

    The thread has the caller's context, and makes one thing at a time, the next one when the one before it was taken.
    What making one raises is raised when its turn comes. However the caller ends, the thread has ended before.

    discard: is called with what was made and is not taken any more.
    """
    next_one: list[T] = []
    make = partial(copy_context().run, lambda: next_one.extend(islice(made, 1)))
    try:
        with ThreadPoolExecutor(1, "ahead") as thread:
            thread.submit(make).result()
            while next_one:
                one = next_one.pop()
                coming = thread.submit(make)
                yield one
                coming.result()
    finally:
        for left in next_one:
            discard(left)
