"""JSON lines, atomic writes, and errors that name file, line and field."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from popi.errors import InputError, LockedError, PopiError

Model = TypeVar("Model", bound=BaseModel)
Row = TypeVar("Row")
Value = TypeVar("Value")

UNFINISHED = ".popi-*.part"
"""Pattern of the names of temporary files. A killed process may leave some."""

MISREAD = "misread"
"""Type of the validation errors of a row that show that other rows may be misread. Such a row is never skipped."""

REPORTED = 10
"""Number of bad rows of a file that are reported."""


class BadRows:
    """Collects the bad rows of one file.

    A reader adds each bad row and calls :meth:`check` at the end of the file. It does so for the whole file, so that
    one run reports the first :data:`REPORTED` bad rows and their total number.

    Example:
        >>> bad_rows = BadRows(skip=True)
        >>> bad_rows.add(InputError("field required", file="users.jsonl", line=3, field="user_id"))
        >>> bad_rows.check(good=7)
        >>> bad_rows.summary()
        'skipped 1 bad row: users.jsonl:3, field user_id: field required'

    Args:
        skip: Whether to continue without bad rows. Otherwise :meth:`check` raises an error if there are any.

    Attributes:
        count: Number of bad rows.
        first: The errors of the first bad rows.
    """

    def __init__(self, *, skip: bool = False) -> None:
        self.skip = skip
        self.count = 0
        self.first: list[InputError] = []

    def add(self, error: InputError) -> None:
        """Adds a bad row.

        Raises:
            InputError: The same error, if rows are skipped but this one must not be.
        """
        if self.skip and not error.skippable:
            raise error
        self.count += 1
        if len(self.first) < REPORTED:
            self.first.append(error)

    def check(self, good: int) -> None:
        """Raises an error if bad rows are not skipped, or if all rows are bad.

        Args:
            good: Number of good rows.

        Raises:
            InputError: About the first bad row, with a note for each further one that is reported.
        """
        if not self.count or (self.skip and good):
            return
        first, *others = self.first
        if not others:
            raise first
        where = f"line {first.line}" if first.field is None else f"line {first.line}, field {first.field}"
        what = first.what if first.fix is None else f"{first.what} ({first.fix})"
        error = InputError(
            f"{self.count} bad rows; the first: {where}: {what}",
            file=first.file,
            fix="all rows are bad; check the format of the file"
            if self.skip
            else "fix them, or continue without them with --skip-bad-rows",
        )
        for other in others:
            error.add_note(str(other))
        if self.count > len(self.first):
            error.add_note(f"... and {self.count - len(self.first)} more")
        raise error

    def summary(self) -> str:
        """Says in one line how many rows were skipped, and which was the first; empty if no row was bad."""
        if not self.count:
            return ""
        rows = "1 bad row" if self.count == 1 else f"{self.count} bad rows; the first"
        return f"skipped {rows}: {self.first[0]}"


def read_jsonl(path: Path, model: type[Model], *, bad_rows: BadRows | None = None) -> Iterator[tuple[int, Model]]:
    """Reads one object per line, in constant memory. Empty lines are ignored.

    Args:
        path: The file.
        model: The type of the objects.
        bad_rows: Collects the bad rows, as in :func:`parse_rows`.

    Yields:
        The line number and the object.

    Raises:
        InputError: If the file cannot be read, or a line is not JSON or not such an object.
    """

    def parse(number: int, record: Any) -> Model:
        return validate(model, record, file=path, line=number)

    return parse_lines(path, parse, bad_rows=bad_rows)


def parse_lines(
    path: Path, parse: Callable[[int, Any], Value], *, bad_rows: BadRows | None = None
) -> Iterator[tuple[int, Value]]:
    """Parses one JSON value per line, in constant memory. Empty lines are ignored, and NaN is read as null.

    Args:
        path: The file.
        parse: Makes the result of a line from its number and its JSON value; raises :class:`InputError` if it is bad.
        bad_rows: Collects the bad rows, as in :func:`parse_rows`.

    Yields:
        The line number and the result.

    Raises:
        InputError: If the file cannot be read, or there are bad rows that are not to be skipped.
    """

    def parse_line(number: int, line: bytes) -> Value:
        return parse(number, _parse(line, path, number, nan_is_null=True))

    return parse_rows(_lines(path), parse_line, bad_rows=bad_rows)


def parse_rows(
    rows: Iterable[tuple[int, Row]], parse: Callable[[int, Row], Value], *, bad_rows: BadRows | None = None
) -> Iterator[tuple[int, Value]]:
    """Parses numbered rows of any kind.

    Args:
        rows: The rows with their numbers.
        parse: Makes the result of a row from its number and its content; raises :class:`InputError` if it is bad.
        bad_rows: Collects the bad rows. After the first one, unless it is skipped, the remaining rows are parsed for
            further ones without yielding anything. ``None`` stops at the first one.

    Yields:
        The number and the result.

    Raises:
        InputError: If there are bad rows that are not to be skipped.
    """
    good = 0
    for number, row in rows:
        try:
            value = parse(number, row)
        except InputError as error:
            if bad_rows is None:
                raise
            bad_rows.add(error)
            continue
        good += 1
        if bad_rows is None or bad_rows.skip or not bad_rows.count:
            yield number, value
    if bad_rows is not None:
        bad_rows.check(good)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Reads one JSON value per line, with its line number. Empty lines are ignored, and NaN is read as null.

    Raises:
        InputError: If the file cannot be read or a line is not JSON.
    """
    return parse_lines(path, lambda number, value: value)


def read_json(path: Path, *, nan_is_null: bool = False) -> Any:
    """Reads a file that contains one JSON value.

    Args:
        path: The file.
        nan_is_null: Whether to read NaN as null, as in users' files, instead of rejecting it.

    Raises:
        InputError: If the file cannot be read or is not JSON.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error
    return _parse(content, path, nan_is_null=nan_is_null)


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark. Line ends are not changed.

    Raises:
        InputError: If the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot be read ({error.strerror})", file=path, fix="check the path")


def _not_utf8(path: Path, line: int | None = None) -> InputError:
    return InputError("is not UTF-8 text", file=path, line=line, fix="save the file as UTF-8")


def _parse(text: bytes, path: Path, number: int | None = None, *, nan_is_null: bool) -> Any:
    """Parses a line of a file, or all of it if there is no line number."""

    def constant(name: str) -> None:
        if name != "NaN" or not nan_is_null:
            raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=constant)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number) from error
    except json.JSONDecodeError as error:
        line, fix = (number, "write one JSON object per line") if number else (error.lineno, "")
        raise InputError(
            f"is not JSON ({error.msg} at character {error.colno})", file=path, line=line, fix=fix
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error})", file=path, line=number) from error


def validate(model: type[Model], record: Any, *, file: Path | None = None, line: int | None = None) -> Model:
    """Makes a model from a parsed value.

    Raises:
        InputError: If it does not fit. The first error is named with its field.
    """
    try:
        return model.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        more = error.error_count() - 1
        raise InputError(
            _what(first),
            file=file,
            line=line,
            field=".".join(_path_in(record, first)) or None,
            fix=f"and {more} more in this place" if more else None,
            skippable=first["type"] != MISREAD,
        ) from error


def _what(error: Mapping[str, Any]) -> str:
    """The message of a validation error in plain words."""
    match error["type"]:
        case "model_type" | "model_attributes_type":
            return "is not a JSON object"
        case "union_tag_not_found":
            return "field required"
        case "union_tag_invalid":
            return f"unknown value {error['ctx']['tag']!r}; use one of {error['ctx']['expected_tags']}"
        case "string_unicode":
            return "contains a lone surrogate (half of a character)"
        case _:
            message: str = error["msg"].removeprefix("Value error, ")
            return message[:1].lower() + message[1:]


def _path_in(record: Any, error: Mapping[str, Any]) -> Iterator[str]:
    """The path to the error by the keys of the record, without the names that pydantic gives to union members."""
    location = error["loc"]
    for depth, part in enumerate(location, start=1):
        inside = dict(enumerate(record)) if isinstance(record, list | tuple) else record
        if isinstance(inside, Mapping) and part in inside:
            record = inside[part]
            yield str(part)
        elif error["type"] == "missing" and depth == len(location):
            yield str(part)
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        yield error["ctx"]["discriminator"].strip("'")


def check_rereadable(path: Path) -> None:
    """Rejects a pipe or a device, for commands that read their input more than once.

    Raises:
        InputError: If it is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError("is not a regular file, but is read twice", file=path, fix="save its content to a file first")


def lock(path: Path) -> IO[bytes]:
    """Locks a file or folder until the returned stream is closed. The lock file is next to the file, or in the folder.

    Raises:
        LockedError: If another process holds the lock.
        OSError: If the lock file cannot be written.
    """
    import fcntl

    held = (path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")).open("ab")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise LockedError(f"{path} is being written by another process; wait for it or choose another path") from error
    if not os.fstat(held.fileno()).st_nlink:
        # The previous holder removed the lock file after it was opened here.
        held.close()
        return lock(path)
    return held


def writable(text: str) -> str:
    """Joins surrogate pairs, and replaces lone surrogates, which UTF-8 cannot represent."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def as_line(value: BaseModel) -> str:
    """One object as a line of JSON, with its line end."""
    return value.model_dump_json() + "\n"


@contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens a temporary file in the same folder that replaces ``path`` if the block succeeds.

    Symbolic links are followed, and the permissions of a replaced file are kept.

    Raises:
        InputError: If ``path`` is a folder, a device or a pipe.
        PopiError: If the disk is full or the path cannot be written; ``path`` is unchanged.
    """
    if path.is_dir():
        raise InputError("is a folder", file=path, fix="name a file in it")
    if path.exists() and not path.is_file():
        raise InputError("is not a regular file", file=path, fix="name a regular file or a new one")
    target = Path(os.path.realpath(path))
    temporary = target.with_name(UNFINISHED.replace("*", secrets.token_hex(6)))
    # UTF-8 cannot represent a lone surrogate; JSON writes it as this escape.
    form: dict[str, Any] = {} if binary else {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    ours = True
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb" if binary else "x", **form) as stream:
            ours = False
            yield stream
            ours = True
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        # Inside the block only a full disk is about this file; other errors belong to the caller.
        if not ours and error.errno not in (ENOSPC, EDQUOT, EFBIG):
            raise
        raise PopiError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically.

    Raises:
        PopiError: If it cannot be written.
    """
    with replacing(path) as stream:
        stream.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically.

    Raises:
        PopiError: If it cannot be written.
    """
    with replacing(path, binary=True) as stream:
        stream.write(content)


def write_jsonl(path: Path, values: Iterable[BaseModel]) -> int:
    """Writes one object per line, atomically, and returns their number.

    Raises:
        PopiError: If the file cannot be written.
    """
    count = 0
    with replacing(path) as stream:
        for value in values:
            stream.write(as_line(value))
            count += 1
    return count


def write_jsonl_together(files: Mapping[Path, Iterable[BaseModel]]) -> None:
    """Writes several files of one object per line. None is changed before all are complete on the disk.

    Raises:
        PopiError: If one of them cannot be written; all are unchanged.
    """
    with ExitStack() as stack:
        for path, values in files.items():
            stream = stack.enter_context(replacing(path))
            for value in values:
                stream.write(as_line(value))
            # A full disk must show before the first file is replaced, which happens at the end of the block.
            stream.flush()
            os.fsync(stream.fileno())
