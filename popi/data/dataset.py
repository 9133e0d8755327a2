"""Examples as a ``datasets.Dataset`` on disk, one user per row. This module needs the extra ``train``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from popi.data.example import PersonalizationExample
from popi.errors import InputError, PopiError
from popi.io import validate

TEXT = Value("string")
FEATURES = Features(
    {
        "user_id": TEXT,
        "signals": List(TEXT),
        "tests": List({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
        "oracles": TEXT,
        "facts": TEXT,
    }
)
"""Signals, oracles and facts differ in their fields, so they are stored as JSON (``datasets.Json`` rounds numbers)."""


def as_row(example: PersonalizationExample) -> dict[str, Any]:
    """Turns an example into a row of ``FEATURES``."""
    return {
        "user_id": example.user.user_id,
        "signals": [signal.model_dump_json() for signal in example.user.signals],
        "tests": [pair.model_dump() for pair in example.tests],
        "oracles": json.dumps(example.oracles, ensure_ascii=False),
        "facts": json.dumps(example.facts, ensure_ascii=False),
    }


def from_row(row: dict[str, Any], *, file: Path | None = None, line: int | None = None) -> PersonalizationExample:
    """Turns a row into an example, the inverse of :func:`as_row`.

    Args:
        row: The row.
        file: The data set, for errors.
        line: The number of the row, for errors.

    Raises:
        InputError: If it is not such a row.
    """

    def parse(field: str, text: str | None) -> Any:
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise InputError(f"is not JSON ({error})", file=file, line=line, field=field) from error

    signals = [parse(f"signals.{place}", signal) for place, signal in enumerate(row["signals"] or ())]
    record = {
        "user": {"user_id": row["user_id"], "signals": signals},
        "tests": row["tests"],
        "oracles": parse("oracles", row["oracles"]),
        "facts": parse("facts", row["facts"]),
    }
    return validate(PersonalizationExample, record, file=file, line=line)


def save(examples: Iterable[PersonalizationExample], folder: Path) -> None:
    """Writes examples atomically, in constant memory.

    Raises:
        InputError: If ``folder`` exists, or there are no examples.
        PopiError: If it cannot be written.
    """
    if folder.exists():
        raise InputError("already exists", file=folder, fix="remove it or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _quiet(), TemporaryDirectory(dir=folder.parent, prefix=".popi-") as scratch:
            # Without a fingerprint, datasets would try to hash the iterator; the cache is temporary anyway.
            made = Dataset.from_generator(
                lambda: map(as_row, examples), features=FEATURES, cache_dir=scratch, fingerprint="popi"
            )
            made.save_to_disk(Path(scratch, "made"))
            os.replace(Path(scratch, "made"), folder)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, PopiError):
            raise error.__cause__ from None
        raise PopiError(f"cannot write {folder}: {error.__cause__ or error}; nothing was changed") from error
    except OSError as error:
        raise PopiError(f"cannot write {folder}: {error.strerror or error}; nothing was changed") from error


def load_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Reads the rows of a data set that :func:`save` wrote, in constant memory.

    Raises:
        InputError: If it is not such a data set.
    """
    try:
        found = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise InputError("is not a data set on disk", file=folder, fix="give one that popi wrote") from error
    if not isinstance(found, Dataset) or found.features != FEATURES:
        raise InputError("is not a data set of users and their signals", file=folder, fix="give one that popi wrote")
    return iter(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off the progress bars of ``datasets``."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
