"""Reading users and their held-out pairs from JSON lines, from parquet, or from a ``datasets.Dataset`` on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from popi.data.example import PersonalizationExample, check_held_out
from popi.errors import InputError, MissingExtra
from popi.io import BadRows, parse_lines, parse_rows, validate
from popi.signals import UserSignals

PARQUET = ".parquet"
TABLES = (".csv", ".tsv")
"""Endings of files that must be converted first."""


def read_examples(path: Path, *, bad_rows: BadRows | None = None) -> Iterator[PersonalizationExample]:
    """Reads examples for training or evaluation, in constant memory except for the ids of the users.

    Args:
        path: JSON lines, where a line with bare signals is an example without held-out pairs; or the folder of a
            ``datasets.Dataset`` that popi wrote.
        bad_rows: Collects the bad rows. They are skipped if its ``skip`` is true; by default they are an error.

    Raises:
        InputError: If the file cannot be read, or it has bad rows that are not to be skipped. A row is also bad if its
            user appeared before, or if one of its held-out pairs cannot be used
            (:func:`popi.data.example.find_unusable`).
        MissingExtra: If a folder is given and ``datasets`` is not installed.
    """
    return _read(path, bad_rows or BadRows(), held_out=True)


def read_users(path: Path, *, bad_rows: BadRows | None = None) -> Iterator[UserSignals]:
    """Reads the signals of users without checking held-out pairs. Otherwise the same as :func:`read_examples`."""
    return (example.user for example in _read(path, bad_rows or BadRows(), held_out=False))


def _read(path: Path, bad_rows: BadRows, *, held_out: bool) -> Iterator[PersonalizationExample]:
    seen: dict[str, int] = {}

    def check(number: int, example: PersonalizationExample) -> PersonalizationExample:
        user_id = example.user.user_id
        if user_id in seen:
            raise InputError(
                f"user {user_id!r} is already in line {seen[user_id]}",
                file=path,
                line=number,
                field="user_id",
                fix="join the two lines into one",
            )
        if held_out:
            try:
                check_held_out(example)
            except InputError as error:
                raise InputError(error.what, file=path, line=number, field=error.field, fix=error.fix) from error
        seen[user_id] = number
        return example

    def read_line(number: int, record: Any) -> PersonalizationExample:
        return check(number, _example(record, path, number))

    if path.is_dir():
        try:
            from popi.data.dataset import from_row, load_rows
        except ModuleNotFoundError as error:
            raise MissingExtra("datasets", "train") from error

        def read_row(number: int, row: dict[str, Any]) -> PersonalizationExample:
            return check(number, from_row(row, file=path, line=number))

        rows = parse_rows(enumerate(load_rows(path), start=1), read_row, bad_rows=bad_rows)
    elif path.is_file() and path.suffix.lower() == PARQUET:
        rows = parse_rows(enumerate(_read_parquet(path), start=1), read_line, bad_rows=bad_rows)
    elif path.is_file() and path.suffix.lower() in TABLES:
        raise InputError("is a table", file=path, fix=f"convert it first: popi data convert csv {path.name}")
    else:
        rows = parse_lines(path, read_line, bad_rows=bad_rows)
    for _, example in rows:
        yield example


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, in constant memory. A column of signals has a null for each field of other kinds."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise MissingExtra("pyarrow", "parquet") from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot be read ({error})", file=path, fix="write the file again") from error


def _example(record: Any, path: Path, number: int) -> PersonalizationExample:
    if isinstance(record, dict) and "messages" in record:
        raise InputError(
            "is a chat log", file=path, line=number, fix=f"convert it first: popi data convert chat {path.name}"
        )
    if isinstance(record, dict) and "user" in record:
        return validate(PersonalizationExample, record, file=path, line=number)
    return PersonalizationExample(user=validate(UserSignals, record, file=path, line=number))
