"""The result of converting files to examples: the examples and the dropped items."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path

from popi.data.example import PersonalizationExample
from popi.errors import InputError
from popi.io import read_json


@dataclass(frozen=True, slots=True)
class Dropped:
    """An item of the files that is not in the examples.

    Attributes:
        reason: Why, in the same words for everything that was dropped for this reason.
        file: The file.
        index: The record, for a file that is a list of records, starting at 0.
        line: The line, for a file that is read by lines, starting at 1.
        field: The field, as a dotted path.
    """

    reason: str
    file: str
    index: int | None = None
    line: int | None = None
    field: str = ""

    @property
    def place(self) -> str:
        """File, record and field in one text."""
        number = f"[{self.index}]" if self.index is not None else f":{self.line}" if self.line is not None else ""
        return f"{self.file}{number}{'.' if self.field else ''}{self.field}"

    def as_record(self) -> dict[str, str | int]:
        """The attributes that are given."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True, slots=True)
class Conversion:
    """The examples and the dropped items."""

    examples: tuple[PersonalizationExample, ...]
    dropped: tuple[Dropped, ...]

    def summary(self) -> dict[str, int]:
        """The numbers of users, signals, held-out pairs and dropped items."""
        return {
            "users": len(self.examples),
            "signals": sum(len(example.user.signals) for example in self.examples),
            "tests": sum(len(example.tests) for example in self.examples),
            "dropped": len(self.dropped),
        }

    def reasons(self) -> list[dict[str, str | int]]:
        """The number of dropped items for each reason, the most frequent first, each with the first place."""
        places: dict[str, list[str]] = {}
        for item in self.dropped:
            places.setdefault(item.reason, []).append(item.place)
        by_count = sorted(places.items(), key=lambda entry: -len(entry[1]))
        return [{"dropped because": reason, "count": len(found), "first": found[0]} for reason, found in by_count]


def read_records(path: Path, *, of: str) -> list[object]:
    """Reads a file that is a list of records.

    Args:
        path: The file.
        of: Description of the records, for the error.

    Raises:
        InputError: If it cannot be read or is not a list.
    """
    records = read_json(path, nan_is_null=True)
    if not isinstance(records, list):
        raise InputError(f"is not a list of {of}", file=path, fix="give the publisher's file unchanged")
    return records


def check_any(path: Path, found: Sized, dropped: Sequence[Dropped], *, what: str, fix: str) -> None:
    """Checks that the conversion has a result.

    Args:
        path: The file or folder.
        found: The converted items.
        dropped: The dropped items.
        what: The expected content of the file, for the error.
        fix: What to do if no items were converted.

    Raises:
        InputError: If no items were converted. It names the first item that was dropped.
    """
    if not found:
        first = f" (the first of {len(dropped)} dropped: {dropped[0].place}, {dropped[0].reason})" if dropped else ""
        raise InputError(f"contains no {what}{first}", file=path, fix=fix)
