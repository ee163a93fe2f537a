"""What is made ahead comes in its order, one at a time, with its errors, and no thread outlives its caller."""

from __future__ import annotations

import signal
import threading
from contextlib import closing
from contextvars import ContextVar

import pytest

from common.workflows.ahead import one_ahead

SECONDS = 30  # after which a test that hangs fails
CALLER = ContextVar("caller", default="")


class Maker:
    """Makes numbers; `begun[i]` and `made[i]` tell when, and it waits for `may[i]` in between."""

    def __init__(self, count, error_at=None):
        self.count, self.error_at = count, error_at
        self.begun, self.made, self.may = ([threading.Event() for _ in range(count)] for _ in range(3))
        self.threads, self.contexts = set(), set()

    def __iter__(self):
        for number in range(self.count):
            self.begun[number].set()
            self.threads.add(threading.current_thread())
            self.contexts.add(CALLER.get())
            assert self.may[number].wait(SECONDS)
            if number == self.error_at:
                raise ZeroDivisionError
            self.made[number].set()
            yield number

    def allow(self, *numbers):
        for number in numbers:
            self.may[number].set()
        return self


def ended(maker):
    return not any(thread.is_alive() for thread in maker.threads)


def test_next_one_is_made_while_the_caller_is_at_the_present_one_and_no_more():
    maker = Maker(4).allow(0, 1, 3)
    given = one_ahead(iter(maker), pytest.fail)
    assert next(given) == 0
    assert maker.made[1].wait(SECONDS)  # while the caller is here
    assert not maker.begun[2].is_set()
    assert next(given) == 1
    assert maker.begun[2].wait(SECONDS)
    assert not maker.made[2].is_set()
    maker.allow(2)
    assert list(given) == [2, 3]
    assert len(maker.threads) == 1
    assert threading.current_thread() not in maker.threads
    assert ended(maker)


def test_thread_has_the_context_of_the_caller():
    before = CALLER.set("here")
    maker = Maker(3).allow(0, 1, 2)
    assert list(one_ahead(iter(maker), pytest.fail)) == [0, 1, 2]
    CALLER.reset(before)
    assert maker.contexts == {"here"}


def test_error_is_raised_at_its_turn():
    maker = Maker(3, error_at=1).allow(0, 1)
    given = one_ahead(iter(maker), pytest.fail)
    assert next(given) == 0
    with pytest.raises(ZeroDivisionError):
        next(given)
    assert ended(maker)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_caller_that_ends_waits_for_the_thread_and_what_was_made_is_discarded(error):
    maker, discarded = Maker(3).allow(0), []
    with pytest.raises(error), closing(one_ahead(iter(maker), discarded.append)) as given:
        next(given)
        assert maker.begun[1].wait(SECONDS)
        threading.Timer(0.05, maker.allow, [1]).start()
        raise error
    assert discarded == [1]
    assert ended(maker)
    assert not maker.begun[2].is_set()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system has no such signals")
def test_ctrl_c_while_the_caller_waits():
    came, discarded = threading.Event(), []

    def stop(*_):
        if not came.is_set():
            came.set()
            raise KeyboardInterrupt

    def make():
        yield 1
        while not came.wait(0.05):  # Python may be told just before it waits, and then hears it afterwards only
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        yield 2

    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(KeyboardInterrupt), closing(one_ahead(make(), discarded.append)) as given:
            list(given)
    finally:
        signal.signal(signal.SIGINT, before)
    assert discarded == [2]
