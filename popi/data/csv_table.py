"""Tables of signals as CSV, one signal or held-out pair per row.

The column ``user_id`` is required. The other columns are the fields of the signals: ``kind``, ``prompt``, ``chosen``,
``rejected``, ``response``, ``score``, ``worst``, ``best``, ``original``, ``edited``, ``text``, ``about``, ``time``,
``said_by``, ``origin`` and ``id``; a column ``facts.NAME`` is a fact of a ``demographics`` row. Cells that do not apply
to a row are empty. ``kind`` may be left out where the filled cells say what a row is:

=================================== ================================================
filled cells                        kind
=================================== ================================================
prompt, chosen, rejected            ``pair``
prompt, response, score             ``rating``, with worst and best unless 1 and 5
prompt, original, edited            ``edit``
text                                ``statement``
text, and about or prompt           ``comment``
facts.NAME                          ``demographics``
prompt, chosen, rejected            ``held_out`` (never inferred): a held-out pair
=================================== ================================================
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from popi.data.convert import Conversion, Dropped, check_any
from popi.data.example import HeldOutPair, PersonalizationExample, find_unusable
from popi.errors import InputError, did_you_mean
from popi.io import BadRows, parse_rows, read_text, validate
from popi.signals import (
    MISSING,
    Comment,
    Demographics,
    Edit,
    PreferencePair,
    Rating,
    Signal,
    Statement,
    UserSignals,
    as_user_id,
)

HELD_OUT = "held_out"
USER, KIND, FACTS = "user_id", "kind", "facts."
SHARED = ("id", "time", "origin", "said_by")
NUMBERS = ("score", "worst", "best")
NOT_TEXTS = (USER, KIND, *SHARED, *NUMBERS)
"""The columns in which a cell like NaN is empty. In the others it may be a text."""

DELIMITERS = ",;\t"

# Statement is before comment: a text that is not about anything is a statement.
_SIGNALS = (PreferencePair, Rating, Edit, Statement, Comment, Demographics)
KINDS: dict[str, type[PreferencePair | Rating | Edit | Statement | Comment | Demographics]] = {
    model.model_fields[KIND].default: model for model in _SIGNALS
}
"""The kinds of signals that a row can be. Conversations are converted from chat logs."""

COLUMNS = tuple(
    dict.fromkeys([USER, KIND, *(name for model in _SIGNALS for name in model.model_fields if name != "facts")])
)
"""The known columns, besides facts."""


def convert_csv(path: Path, *, bad_rows: BadRows | None = None) -> Conversion:
    """Converts a table of signals.

    The delimiter may be a comma, a semicolon or a tab. Unknown columns, repeated rows and held-out pairs that cannot be
    used (:func:`popi.data.example.find_unusable`) are dropped.

    Args:
        path: The table, in UTF-8, with the names of the columns in the first row.
        bad_rows: Collects the bad rows. Skipped ones are reported as dropped. By default they are an error.

    Raises:
        InputError: If the file is not such a table, or has bad rows that are not to be skipped.
    """
    header, delimiter, rows = _open(path)
    names = [_column(name) for name in header]
    dropped = [
        Dropped("unknown column", path.name, field=name.strip() or f"column {place}")
        for place, name in enumerate(header, start=1)
        if not _known(names[place - 1])
    ]

    users: dict[str, _User] = {}

    def parse(line: int, cells: Sequence[str]) -> None:
        try:
            user_id, item = _parse(names, cells, delimiter, path, line)
            dropped.extend(users.setdefault(user_id, _User()).add(item, path, line))
        except InputError as error:
            dropped.append(Dropped(error.what, path.name, line=line, field=error.field or ""))
            raise

    for _ in parse_rows(rows, parse, bad_rows=bad_rows or BadRows()):
        pass
    examples = []
    for user_id, user in users.items():
        example, unusable = user.finish(user_id)
        examples.append(example)
        dropped += [Dropped(reason, path.name, line=line) for line, reason in unusable.items()]
    check_any(path, examples, dropped, what="rows", fix=f"give it rows, under the columns {', '.join(COLUMNS)}")
    return Conversion(tuple(examples), tuple(dropped))


class _User:
    """The rows of one user."""

    def __init__(self) -> None:
        self._signals: dict[str, tuple[int, Signal]] = {}
        self._pairs: dict[int, HeldOutPair] = {}

    def add(self, item: Signal | HeldOutPair, path: Path, line: int) -> list[Dropped]:
        """Adds a row, unless it repeats an earlier one.

        Raises:
            InputError: If its id is that of a different signal.
        """
        if isinstance(item, HeldOutPair):
            self._pairs[line] = item
            return []
        earlier, known = self._signals.setdefault(item.id, (line, item))
        if known != item:
            raise InputError(
                f"the id {item.id!r} belongs to another signal of this user in line {earlier}",
                file=path,
                line=line,
                field="id",
                fix="give each signal a different id",
            )
        return [] if earlier == line else [Dropped("repeats an earlier row", path.name, line=line)]

    def finish(self, user_id: str) -> tuple[PersonalizationExample, dict[int, str]]:
        """The example of the user, and the held-out pairs that cannot be used: their lines, and the reasons."""
        user = UserSignals(user_id=user_id, signals=tuple(signal for _, signal in self._signals.values()))
        lines = list(self._pairs)
        unusable = {lines[place]: why for place, why in find_unusable(user, tuple(self._pairs.values())).items()}
        tests = tuple(pair for line, pair in self._pairs.items() if line not in unusable)
        return PersonalizationExample(user=user, tests=tests), unusable


def _open(path: Path) -> tuple[list[str], str, Iterator[tuple[int, list[str]]]]:
    """The header, the delimiter, and the rows with the numbers of their lines."""
    text = read_text(path)
    headers = {
        delimiter: next(csv.reader(StringIO(text, newline=""), delimiter=delimiter), []) for delimiter in DELIMITERS
    }
    delimiter = max(headers, key=lambda found: sum(_known(_column(name)) for name in headers[found]))
    header = headers[delimiter]
    names = [_column(name) for name in header]
    if USER not in names:
        found = ", ".join(name.strip() for name in header)
        raise InputError(
            f"has no column {USER}, but {found[:200] or 'no header'}",
            file=path,
            line=1,
            fix=f"name the columns in the first row: {', '.join(COLUMNS)}",
        )
    repeated = next((name for name in names if _known(name) and names.count(name) > 1), None)
    if repeated is not None:
        raise InputError("the column appears twice", file=path, line=1, field=repeated, fix="remove one of them")
    rows = _rows(path, text, delimiter)
    next(rows)
    return header, delimiter, rows


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # The limit is meant for untrusted streams; here the whole file is in memory already.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"malformed CSV in the row that starts here ({error})", file=path, line=line, fix="check its quotes"
        ) from error


def _column(name: str) -> str:
    """The normalized name of a column. Names of facts keep their case."""
    head, dot, fact = name.strip().partition(".")
    head = re.sub(r"[\s-]+", "_", head.casefold())
    return f"{head}{dot}{fact.strip()}"


def _known(name: str) -> bool:
    return name in COLUMNS or (name.startswith(FACTS) and name != FACTS)


def _parse(
    names: Sequence[str], cells: Sequence[str], delimiter: str, path: Path, line: int
) -> tuple[str, Signal | HeldOutPair]:
    """A row as the id of its user and the signal or pair."""
    if len(cells) != len(names):
        what = f"the row has {len(cells)} cells, and the header {len(names)}"
        fix = "put cells that contain the delimiter in quotes"
        if len(cells) < len(names):
            fix = "write empty cells too"
        raise InputError(what, file=path, line=line, fix=fix)
    filled = {name: text for name, cell in zip(names, cells, strict=True) if _known(name) and (text := cell.strip())}
    filled = {name: text for name, text in filled.items() if text not in MISSING or name not in NOT_TEXTS}
    if delimiter == ";":  # the delimiter where numbers have decimal commas
        filled |= {name: filled[name].replace(",", ".") for name in NUMBERS if name in filled}
    try:
        user_id = as_user_id(_without_decimals(filled.pop(USER, "")))
    except InputError as error:
        raise InputError(error.what, file=path, line=line, field=USER, fix=error.fix) from error
    record: dict[str, Any] = {name: text for name, text in filled.items() if not name.startswith(FACTS)}
    if facts := {name.removeprefix(FACTS): text for name, text in filled.items() if name.startswith(FACTS)}:
        record["facts"] = facts
    if "id" in record:
        record["id"] = _without_decimals(record["id"])
    if "said_by" in record:
        record["said_by"] = record["said_by"].casefold()
    kind = _column(record.pop(KIND, "")) or _infer_kind(record, path, line)
    if kind == HELD_OUT:
        return user_id, validate(HeldOutPair, record, file=path, line=line)
    if kind not in KINDS:
        known = [*KINDS, HELD_OUT]
        raise InputError(f"unknown kind {kind!r}", file=path, line=line, field=KIND, fix=did_you_mean(kind, known))
    return user_id, validate(KINDS[kind], record, file=path, line=line)


def _infer_kind(record: dict[str, Any], path: Path, line: int) -> str:
    filled = record.keys() - SHARED
    for kind, model in KINDS.items():
        content = model.model_fields.keys() - {KIND, *SHARED}
        required = {name for name, field in model.model_fields.items() if field.is_required()}
        if required <= filled <= content:
            return kind
    cells = f"with filled cells in {', '.join(sorted(filled))}" if filled else "without filled cells"
    raise InputError(
        f"the kind of a row {cells} cannot be inferred",
        file=path,
        line=line,
        fix=f"fill the cells of one kind: {', '.join(KINDS)}",
    )


def _without_decimals(text: str) -> str:
    """Restores an id from a column that pandas converted to floating-point numbers."""
    return re.sub(r"^(-?(?:0|[1-9]\d*))\.0$", r"\1", text)
