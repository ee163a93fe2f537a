"""How far a long computation is, as one reads it on a terminal and in a file."""

from __future__ import annotations

import io

import pytest

from common.progress import STEP_S, Progress, inside, quiet


@pytest.fixture
def seconds():
    """A clock that a test sets."""
    return [0.0]


def progress(total, seconds):
    return Progress(total, clock=lambda: seconds[0])


def test_in_a_pipe_it_is_lines(seconds, capsys):
    with progress(3, seconds) as shown:
        for _ in shown.each(["a", "b", "c"]):
            seconds[0] += 4
    lines = ["1 of 3 cases in 4 s, about 8 s left", "2 of 3 cases in 8 s, about 4 s left"]
    assert capsys.readouterr().err.splitlines() == [*lines, "3 of 3 cases in 12 s, about 0 s left"]


def test_lines_of_quick_cases_are_few_and_the_last_is_said(seconds, capsys):
    with progress(1000, seconds) as shown:
        for _ in shown.each(range(1000)):
            seconds[0] += 0.01
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("1000 of 1000 cases")


def test_of_one_case_only_what_takes_long_is_said(seconds, capsys):
    with progress(1, seconds) as shown:
        for _ in shown.each(["sub\udce901"]):  # a name that is not UTF-8
            for _ in inside([range(16), range(16), range(4)]):
                seconds[0] += STEP_S * 0.6
    assert capsys.readouterr().err == "sub\\udce901: 32 of 36 slices\n"


def test_quiet_and_outside_of_a_progress_nothing_is_said(seconds, capsys):
    with quiet(), progress(2, seconds) as shown:
        for _ in shown.each("ab"):
            for _ in inside([range(2)] * 3):
                seconds[0] += 100
    assert [len(part) for part in inside([range(3), range(2)])] == [3, 2]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar(seconds, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress(2, seconds) as shown:
        for _ in shown.each(["first", "second"]):
            for _ in inside([range(16), range(8)]):
                pass
    assert "2/2" in terminal.getvalue()
    assert "second: 24/24 slices" in terminal.getvalue()


def test_a_closed_stderr_stops_nothing(seconds, monkeypatch):
    closed = io.StringIO()
    with progress(2, seconds) as shown:
        monkeypatch.setattr("sys.stderr", closed)
        closed.close()
        assert list(shown.each("ab")) == ["a", "b"]
