"""What commands print: tables on a terminal, JSON lines when piped; progress and notes on standard error."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

from popi.errors import one_line

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON lines, also on a terminal.")]
"""The option of every command that prints a result, for :func:`wants_json` or :func:`print_records`."""

SECONDS_BETWEEN_LINES = 5.0


def wants_json(flag: bool) -> bool:
    """Whether results are printed as JSON lines: when asked for, or when the output is not a terminal."""
    return flag or not sys.stdout.isatty()


def print_json(record: Mapping[str, Any]) -> None:
    """Prints one JSON line."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def print_records(records: Iterable[Mapping[str, Any]], *, json_flag: bool, title: str = "") -> None:
    """Prints records of one shape: a table with a column a key on a terminal, else a JSON line each."""
    rows = list(records)
    if not wants_json(json_flag):
        print_table(rows, title=title)
        return
    for row in rows:
        print_json(row)


def print_table(records: Sequence[Mapping[str, Any]], *, title: str = "") -> None:
    """Prints records of one shape as a table, a column a key; without borders, so that figures fit 80 columns."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in records[0] if records else ():
        cells = [shown(_cell(record[name])) for record in records]
        # A head wraps before a figure does.
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
    """A text from anywhere with the control characters visible that a terminal would act on; lines stay lines."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: found.group().encode("unicode_escape").decode(), text)


def note(text: str) -> None:
    """Prints one line on standard error."""
    sys.stderr.write(f"popi: {one_line(text)}\n")
    sys.stderr.flush()


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def telling_log() -> Iterator[None]:
    """Within it, what the package logs of its work is printed as notes."""
    log, handler = logging.getLogger("popi"), _Notes()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class Progress(Protocol):
    """Told how far the work is."""

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Counts more of the work as done; ``figures`` stand beside it until there are others."""

    def note(self, text: str) -> None:
        """Prints one line on standard error without breaking the display."""


@contextmanager
def progress(label: str, total: int) -> Iterator[Progress]:
    """Shows how far the work is: a bar if standard error is a terminal, else a plain line now and then."""
    if not sys.stderr.isatty():
        lines = _Lines(label, total)
        yield lines
        lines.finish()
        return
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
    with RichProgress(*columns, console=Console(stderr=True)) as display:
        yield _Bar(display, display.add_task(label, total=total, figures=""))


class _Lines:
    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done, self._figures = label, total, 0, ""
        self._start = self._printed = time.monotonic()

    def advance(self, count: int = 1, figures: str = "") -> None:
        self._done += count
        self._figures = figures or self._figures
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def note(self, text: str) -> None:
        note(text)

    def finish(self) -> None:
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        figures = f", {self._figures}" if self._figures else ""
        note(f"{self._label}: {self._done} of {self._total}, {self._printed - self._start:.0f} s{figures}")


class _Bar:
    def __init__(self, display: Any, task: Any) -> None:
        self._display, self._task = display, task

    def advance(self, count: int = 1, figures: str = "") -> None:
        self._display.update(self._task, advance=count, **({"figures": figures} if figures else {}))

    def note(self, text: str) -> None:
        self._display.console.print(f"popi: {one_line(text)}", markup=False, highlight=False, soft_wrap=True)
