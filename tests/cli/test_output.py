from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from popi.cli import output

RECORDS = [{"user": "ann", "share": 0.25, "ids": ["a", "b"]}, {"user": "bob\x1b[31m", "share": None, "ids": []}]


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes both streams, as captured in this very test, look like one."""
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


def test_records_are_json_lines_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_records(RECORDS, json_flag=False, title="Users")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == RECORDS


def test_records_are_a_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    output.print_records(RECORDS, json_flag=False, title="Users")
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in ("Users", "user", "share", "ann", "0.250", "a, b"))
    assert "\x1b[31m" not in shown


def test_a_table_of_figures_takes_one_line_a_row_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch)
    names = ("accuracy", "minus untrained summary", "minus no context", "win rate")
    row = {"row": "another users summary", **dict.fromkeys(names, "-17.8 ±9.5"), "context tokens": "499.6"}
    output.print_table([row])
    lines = capsys.readouterr().out.splitlines()
    [figures] = [line for line in lines if "another" in line]
    assert figures.split() == ["another", "users", "summary", *["-17.8", "±9.5"] * 4, "499.6"]
    assert len(figures) <= 80


def test_records_are_json_lines_on_a_terminal_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch)
    output.print_records(RECORDS, json_flag=True)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_records_are_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_records([], json_flag=False)
    assert capsys.readouterr().out == ""


def test_json_keeps_every_script_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"text": "👩‍👩‍👧 שלום 日本語\n"})
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "שלום" in line
    assert json.loads(line) == {"text": "👩‍👩‍👧 שלום 日本語\n"}


def test_a_note_is_one_line_that_no_terminal_acts_on(capsys: pytest.CaptureFixture[str]) -> None:
    output.note("user 'a\nb\x1b[2J' failed")
    assert capsys.readouterr().err == "popi: user 'a b\\x1b[2J' failed\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds since the start."""
    time = [0.0]
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: time[0]))

    def set_to(seconds: float) -> None:
        time[0] = seconds

    return set_to


def test_progress_is_a_plain_line_now_and_then_when_piped(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    with output.progress("summaries", 60, "users") as shown:
        clock(1)
        shown.advance()
        clock(6)
        shown.advance()
        shown.note("user 'x' failed")
        clock(60)
        shown.advance(18)
        clock(62)
        shown.advance(39)
        clock(8000)
        shown.advance()
    assert capsys.readouterr().err.splitlines() == [
        "popi: summaries: 2 of 60, 6 s, 20 users per minute, 3 min left",
        "popi: user 'x' failed",
        "popi: summaries: 20 of 60, 60 s, 20 users per minute, 2 min left",
        "popi: summaries: 60 of 60, 2.2 h, 0.5 users per minute",
    ]


def test_other_figures_are_shown_with_the_remaining_time(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    with output.progress("training", 3) as shown:
        clock(20)
        shown.advance(1, "loss 0.5")
        clock(21)
        shown.advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "popi: training: 1 of 3, 20 s, 40 s left, loss 0.5",
        "popi: training: 3 of 3, 21 s, loss 0.5",
    ]


def test_a_line_is_printed_while_nothing_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "SECONDS_OF_SILENCE", 0.02)
    with output.progress("summaries", 3, "users") as shown:
        deadline = time.monotonic() + 10
        while (lines := capsys.readouterr().err) == "" and time.monotonic() < deadline:
            time.sleep(0.005)
        shown.advance(3)
    assert lines.splitlines()[0] == "popi: summaries: 0 of 3, 0 s"


def test_short_preparations_print_nothing(capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]) -> None:
    with output.progress("users", 2, transient=True) as shown:
        shown.advance(2)
    assert capsys.readouterr().err == ""
    with output.progress("users", 20, transient=True) as shown:
        clock(6)
        shown.advance()
        clock(7)
        shown.advance(19)
    assert capsys.readouterr().err == "popi: users: 1 of 20, 6 s, 2 min left\n"


def test_an_error_ends_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), output.progress("summaries", 3):
        raise KeyError
    assert capsys.readouterr().err == ""
    assert not any(thread.name == "popi-progress" for thread in threading.enumerate())


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    with output.progress("summaries", 2, "users") as shown:
        shown.advance(2)
        shown.note("user [bold]x[/] failed")
    drawn = capsys.readouterr()
    assert "2/2" in drawn.err
    assert "users per minute" in drawn.err
    assert "popi: user [bold]x[/] failed" in drawn.err
    assert drawn.out == ""
