"""The result of converting files to examples: the examples and the dropped items; division for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from popi.data.example import PersonalizationExample, text_key
from popi.errors import InputError
from popi.io import read_json

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Dropped:
    """An item of the files that is not in the examples.

    Attributes:
        reason: Why, in the same words for everything that was dropped for this reason.
        file: The file.
        index: The record, for a file that is a list of records, starting at 0.
        line: The line, for a file that is read by lines, starting at 1.
        field: The field, as a dotted path.
        user: The id of the user, for a part of an example. The field is then one of the example.
    """

    reason: str
    file: str
    index: int | None = None
    line: int | None = None
    field: str = ""
    user: str = ""

    @property
    def place(self) -> str:
        """File, record and field in one text."""
        if self.user:
            return f"{self.file}, user {self.user}, {self.field}"
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


def divide(
    items: Sequence[Item],
    texts_of: Callable[[Item], Iterable[str]],
    *,
    fraction: float,
    seed: int,
    file: Path | None = None,
) -> tuple[list[Item], list[Item]]:
    """Divides items at random into those for training and those for evaluation, which have no text in common.

    Items that share a text, directly or through others, stay together, so the size of the second part is as near to the
    fraction as whole groups allow. The division depends on the items, the fraction and the seed only.

    Example:
        >>> train, evaluation = divide(["a", "b", "A", "c"], lambda item: [item], fraction=0.25, seed=1)
        >>> sorted([len(train), len(evaluation)])
        [1, 3]

    Args:
        items: The items.
        texts_of: The texts of an item. They are compared by :func:`popi.data.example.text_key`.
        fraction: Fraction of the items for evaluation.
        seed: Determines the division.
        file: The file or folder of the items, for errors.

    Raises:
        InputError: If the fraction is not between 0 and 1, or one of the parts is empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"{fraction:g} is not between 0 and 1", field="eval_fraction")
    groups = _connected([{text_key(text) for text in texts_of(item)} for item in items])
    Random(f"{seed}/evaluation").shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        # At least half of the group is missing, so that the group brings the size nearer to the fraction.
        if len(chosen) + len(group) / 2 <= fraction * len(items):
            chosen.update(group)
    if not 0 < len(chosen) < len(items):
        count = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
        raise InputError(
            f"contains {len(items)} items in {count} by common texts; a fraction of {fraction:g} leaves "
            f"none of them for {'training' if chosen else 'evaluation'}",
            file=file,
            fix="give another fraction, or more data",
        )
    parts: tuple[list[Item], list[Item]] = [], []
    for place, item in enumerate(items):
        parts[place in chosen].append(item)
    return parts


def _connected(texts: Sequence[set[str]]) -> list[list[int]]:
    """The places, in groups that share no text with each other."""
    groups: dict[int, list[int]] = {}
    group_of: dict[str, int] = {}
    for place, own in enumerate(texts):
        groups[place] = [place]
        for old in {group_of[text] for text in own if text in group_of}:
            groups[place] += groups.pop(old)
        group_of |= {text: place for member in groups[place] for text in texts[member]}
    return [sorted(group) for _, group in sorted(groups.items())]
