"""What a conversion of a publisher's files gives: examples, and an account of what was left out."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from popi.data.example import PersonalizationExample
from popi.errors import InputError
from popi.io import read_json


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something that is in the files and not in the examples.

    Attributes:
        reason: Why, in words that are the same for all of a kind.
        file: The file it is in.
        index: The record in it, counted from 0; ``None`` is the whole file.
        field: The field at fault, as a dotted path.
    """

    reason: str
    file: str
    index: int | None = None
    field: str = ""

    @property
    def place(self) -> str:
        """Where it is, in one piece."""
        record = self.file if self.index is None else f"{self.file}[{self.index}]"
        return f"{record}.{self.field}" if self.field else record


@dataclass(frozen=True, slots=True)
class Conversion:
    """Examples and what was dropped on the way to them."""

    examples: tuple[PersonalizationExample, ...]
    dropped: tuple[Dropped, ...]

    def summary(self) -> dict[str, int]:
        """How many there are of what."""
        return {
            "users": len(self.examples),
            "signals": sum(len(example.user.signals) for example in self.examples),
            "tests": sum(len(example.tests) for example in self.examples),
            "dropped": len(self.dropped),
        }

    def reasons(self) -> list[dict[str, str | int]]:
        """What was dropped by reason, the most frequent first, each with the first place."""
        places: dict[str, list[str]] = {}
        for item in self.dropped:
            places.setdefault(item.reason, []).append(item.place)
        by_count = sorted(places.items(), key=lambda entry: -len(entry[1]))
        return [{"dropped because": reason, "count": len(found), "first": found[0]} for reason, found in by_count]


def read_records(path: Path, *, holds: str) -> list[object]:
    """Reads a file that is a list of records.

    Args:
        path: The file.
        holds: What its records are, for the error.

    Raises:
        InputError: If it cannot be read or is not a list.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise InputError(f"is not a list of {holds}", file=path, fix="give a file as its publisher made it")
    return records


def check_any(path: Path, found: Sized, dropped: Sequence[Dropped], *, what: str) -> None:
    """Refuses files of which nothing is left.

    Raises:
        InputError: If nothing was found; it names the first thing that was dropped.
    """
    if not found:
        first = f" (the first of {len(dropped)} dropped: {dropped[0].place}, {dropped[0].reason})" if dropped else ""
        raise InputError(f"no {what} in it{first}", file=path, fix="give the files as their publisher made them")
