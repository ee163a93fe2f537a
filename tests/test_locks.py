"""One process at a time, and none waits for one that was killed."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from common import locks
from common.locks import locked


def test_one_at_a_time(tmp_path):
    with locked(tmp_path / "out", "a") as first, locked(tmp_path / "out", "a", wait=False) as second:
        assert (first, second) == (True, False)
        with locked(tmp_path / "out", "b", wait=False) as other:
            assert other
    with locked(tmp_path / "out", "a", wait=False) as again:
        assert again
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_process_that_is_killed_holds_nothing(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:  # holds the lock until it is killed
        with locked(tmp_path, "a"):
            os.write(tell, b"x")
            signal.pause()
    os.read(ready, 1)
    with locked(tmp_path, "a", wait=False) as free:
        assert not free
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path, "a") as free:
        assert free
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    for _ in range(2):
        with locked(tmp_path, "a", wait=False) as free:
            assert free
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "only one process" in said
