"""JSON lines in and out, files that are whole or absent, and errors that name file, line and field."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from popi.errors import InputError, PopiError

Model = TypeVar("Model", bound=BaseModel)


def read_jsonl(path: Path, model: type[Model]) -> Iterator[tuple[int, Model]]:
    """Reads one object a line, with its line number, in constant memory. Empty lines are passed over.

    Raises:
        InputError: If the file cannot be read, or a line is not JSON or not such an object.
    """
    for number, record in read_json_lines(path):
        yield number, validate(model, record, file=path, line=number)


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Reads one JSON value a line, with its line number.

    Raises:
        InputError: If the file cannot be read or a line is not JSON.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, path, number)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path, fix="check the path") from error


def _parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", file=path, line=number, fix="save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(
            f"is not JSON: {error}", file=path, line=number, fix="one JSON object a line"
        ) from error


def validate(model: type[Model], record: Any, *, file: Path | None = None, line: int | None = None) -> Model:
    """Makes a model of a parsed value.

    Raises:
        InputError: If it does not fit; the first misfit is named with its field.
    """
    try:
        return model.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        more = error.error_count() - 1
        fix = f"and {more} more in this place" if more else None
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(
            message[:1].lower() + message[1:], file=file, line=line, field=field, fix=fix
        ) from error


def as_line(value: BaseModel) -> str:
    """One object as a line of JSON."""
    return value.model_dump_json() + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Opens a temporary file beside ``path`` that takes its place only when everything went well.

    Raises:
        PopiError: If the disk is full or the place cannot be written; ``path`` is as it was.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogatepass") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise PopiError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        PopiError: If it cannot be written.
    """
    with replacing(path) as stream:
        stream.write(text)


def write_jsonl(path: Path, values: Iterable[BaseModel]) -> int:
    """Writes one object a line, whole or not at all, and returns how many.

    Raises:
        PopiError: If it cannot be written.
    """
    count = 0
    with replacing(path) as stream:
        for value in values:
            stream.write(as_line(value))
            count += 1
    return count
