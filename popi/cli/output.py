"""Output of commands: tables on a terminal, JSON lines when piped; progress and notes on standard error."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

from popi.errors import one_line

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON lines, also on a terminal.")]
"""The option of every command that prints results. See :func:`wants_json`."""

SECONDS_BETWEEN_LINES = 5.0
"""Minimum time between two lines of progress."""

SECONDS_OF_SILENCE = 30.0
"""Maximum time between them."""


def wants_json(flag: bool) -> bool:
    """Whether results are printed as JSON lines: if requested, or if the output is not a terminal."""
    return flag or not sys.stdout.isatty()


def print_json(record: Mapping[str, Any]) -> None:
    """Prints one JSON line."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def print_records(records: Iterable[Mapping[str, Any]], *, json_flag: bool, title: str = "") -> None:
    """Prints records with the same keys: a table on a terminal, else one JSON line per record."""
    rows = list(records)
    if not wants_json(json_flag):
        print_table(rows, title=title)
        return
    for row in rows:
        print_json(row)


def print_table(records: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Prints records with the same keys as a table, without borders, so that figures fit into 80 columns."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in records[0] if records else ():
        cells = [shown(_cell(record[name])) for record in records]
        # Headings wrap before figures do.
        width = max(cell_len(part) for part in (*name.split(), *"\n".join(cells).splitlines()))
        table.add_column(name, vertical="bottom", max_width=width)
    for record in records:
        table.add_row(*(Text(shown(_cell(value))) for value in record.values()))
    Console(highlight=False).print(table, end="\n\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def shown(text: str) -> str:
    """Makes any text safe for a terminal: control characters become visible, line breaks stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: match.group().encode("unicode_escape").decode(), text)


def note(text: str) -> None:
    """Prints one line on standard error."""
    sys.stderr.write(f"{_note(text)}\n")
    sys.stderr.flush()


def _note(text: str) -> str:
    """Formats a note. The library's argument ``max_tokens`` becomes the name of the option.

    Under torchrun, the notes of all ranks but the first name their rank.
    """
    rank = os.environ.get("RANK", "0")
    source = "popi" if rank == "0" else f"popi: rank {rank}"
    return f"{source}: {one_line(text).replace('raise max_tokens', 'raise --max-tokens')}"


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def telling_log(level: int = logging.INFO) -> Iterator[None]:
    """Prints what the package logs inside the block as notes.

    Args:
        level: The lowest level that is printed.
    """
    log, handler = logging.getLogger("popi"), _Notes()
    before = log.level
    outer = any(isinstance(known, _Notes) for known in log.handlers)
    if not outer:
        log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class Progress(Protocol):
    """Shows progress."""

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Counts items as done. ``figures`` are shown next to the count until they are replaced."""

    def note(self, text: str) -> None:
        """Prints one line on standard error."""


@contextmanager
def progress(label: str, total: int, unit: str = "", *, transient: bool = False) -> Iterator[Progress]:
    """Shows progress: a bar if standard error is a terminal, else lines of text.

    Args:
        label: Name of the work, for example ``summaries``.
        total: Number of items.
        unit: Name of the items, for example ``users``. If it is given, the number of items per minute is shown.
        transient: Remove the bar at the end, or print no last line: for the preparation of other work.
    """
    speed = _Speed(total, unit)
    make = _bar if sys.stderr.isatty() else _lines
    shown = make(label, total, speed, transient)
    with shown as display:
        yield display


class _Speed:
    """The speed so far, and the remaining time. Both are empty before the first item is done."""

    def __init__(self, total: int, unit: str) -> None:
        self.done, self._total, self._unit, self._start = 0, total, unit, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def rate(self) -> str:
        per_minute = 60 * self.done / max(self.seconds(), 1e-3)
        figure = f"{per_minute:,.0f}" if per_minute >= 10 else f"{per_minute:.1f}"
        return f"{figure} {self._unit} per minute" if self._unit and self.done else ""

    def rest(self) -> str:
        left = self.seconds() / self.done * (self._total - self.done) if self.done else 0
        return f"{_duration(left)} left" if self.done < self._total and self.done else ""


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def _lines(label: str, total: int, speed: _Speed, transient: bool) -> Iterator[Progress]:
    lines = _Lines(label, total, speed)
    # Print lines even if no item is finished.
    thread = threading.Thread(target=lines.repeat, name="popi-progress", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        lines.ended.set()
        thread.join()
    if not transient:
        lines.print()


class _Lines:
    def __init__(self, label: str, total: int, speed: _Speed) -> None:
        self._label, self._total, self._speed, self._figures = label, total, speed, ""
        self._printed = 0.0
        self.ended = threading.Event()

    def advance(self, count: int = 1, figures: str = "") -> None:
        self._speed.done += count
        self._figures = figures or self._figures
        # The last line is printed at the end.
        if self._speed.done < self._total and self._speed.seconds() - self._printed >= SECONDS_BETWEEN_LINES:
            self.print()

    def note(self, text: str) -> None:
        note(text)

    def repeat(self) -> None:
        """Prints a line after every period of silence, until the end."""
        while not self.ended.wait(max(SECONDS_OF_SILENCE - (self._speed.seconds() - self._printed), 0.01)):
            if self._speed.seconds() - self._printed >= SECONDS_OF_SILENCE:
                self.print()

    def print(self) -> None:
        self._printed = self._speed.seconds()
        count = f"{self._label}: {self._speed.done} of {self._total}"
        parts = (count, _duration(self._printed), self._speed.rate(), self._speed.rest(), self._figures)
        note(", ".join(filter(None, parts)))


@contextmanager
def _bar(label: str, total: int, speed: _Speed, transient: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[figures]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=transient) as display:
        yield _Bar(display, display.add_task(label, total=total, figures=""), speed)


class _Bar:
    def __init__(self, display: Any, task: Any, speed: _Speed) -> None:
        self._display, self._task, self._speed, self._figures = display, task, speed, ""

    def advance(self, count: int = 1, figures: str = "") -> None:
        self._speed.done += count
        self._figures = figures or self._figures
        shown = ", ".join(filter(None, (self._figures, self._speed.rate())))
        self._display.update(self._task, advance=count, figures=shown)

    def note(self, text: str) -> None:
        self._display.console.print(_note(text), markup=False, highlight=False, soft_wrap=True)
