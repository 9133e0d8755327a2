"""Examples as a ``datasets.Dataset`` on disk, a row a user. This module needs the extra ``train``."""

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
"""Signals differ in their fields, and so do oracles and facts: they are JSON. (``datasets.Json`` rounds numbers.)"""


def as_row(example: PersonalizationExample) -> dict[str, Any]:
    """An example as a row of ``FEATURES``."""
    return {
        "user_id": example.user.user_id,
        "signals": [signal.model_dump_json() for signal in example.user.signals],
        "tests": [pair.model_dump() for pair in example.tests],
        "oracles": json.dumps(example.oracles, ensure_ascii=False),
        "facts": json.dumps(example.facts, ensure_ascii=False),
    }


def from_row(row: dict[str, Any]) -> PersonalizationExample:
    """A row as an example, inverse of :func:`as_row`."""
    record = {
        "user": {"user_id": row["user_id"], "signals": [json.loads(signal) for signal in row["signals"]]},
        "tests": row["tests"],
        "oracles": json.loads(row["oracles"]),
        "facts": json.loads(row["facts"]),
    }
    return PersonalizationExample.model_validate(record)


def save(examples: Iterable[PersonalizationExample], folder: Path) -> None:
    """Writes examples, whole or not at all, in constant memory.

    Raises:
        InputError: If there is something already, or there are no examples.
        PopiError: If it cannot be written.
    """
    if folder.exists():
        raise InputError("exists already", file=folder, fix="remove it or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _quiet(), TemporaryDirectory(dir=folder.parent, prefix=".popi-") as scratch:
            # A fingerprint of its own, for what the examples come from has none; the cache is gone afterwards anyway.
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


def load(folder: Path) -> Iterator[PersonalizationExample]:
    """Reads what :func:`save` wrote, in constant memory.

    Raises:
        InputError: If it is not such a data set.
    """
    try:
        found = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise InputError("is not a data set on disk", file=folder, fix="give one that popi wrote") from error
    if not isinstance(found, Dataset) or found.features != FEATURES:
        raise InputError("is not a data set of users and their signals", file=folder, fix="give one that popi wrote")
    return map(from_row, found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of ``datasets``."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
