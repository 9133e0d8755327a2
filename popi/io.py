"""JSON lines in and out, files that are whole or absent, and errors that name file, line and field."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from popi.errors import InputError, PopiError

Model = TypeVar("Model", bound=BaseModel)

UNFINISHED = ".popi-*.part"
"""Names what is being written, and what a killed process leaves of it."""


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


def read_json(path: Path) -> Any:
    """Reads a file that is one JSON value.

    Raises:
        InputError: If it cannot be read or is not JSON.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path, fix="check the path") from error
    return _parse(content, path)


def _parse(text: bytes, path: Path, number: int | None = None) -> Any:
    """Parses a line of a file, or all of it where there is no number."""
    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", file=path, line=number, fix="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line, fix = (number, "write one JSON object a line") if number else (error.lineno, "")
        raise InputError(
            f"is not JSON ({error.msg} at character {error.colno})", file=path, line=line, fix=fix
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error})", file=path, line=number) from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def validate(model: type[Model], record: Any, *, file: Path | None = None, line: int | None = None) -> Model:
    """Makes a model of a parsed value.

    Raises:
        InputError: If it does not fit; the first misfit is named with its field.
    """
    try:
        return model.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        what = "is not a JSON object" if first["type"] == "model_type" else message[:1].lower() + message[1:]
        field = ".".join(_path_in(record, first["loc"], missing=first["type"] == "missing")) or None
        more = error.error_count() - 1
        fix = f"and {more} more in this place" if more else None
        raise InputError(what, file=file, line=line, field=field, fix=fix) from error


def _path_in(record: Any, location: Sequence[int | str], *, missing: bool) -> Iterator[str]:
    """The way to a misfit by the keys of the record alone, without the names that pydantic gives to alternatives."""
    for depth, part in enumerate(location, start=1):
        inside = dict(enumerate(record)) if isinstance(record, list | tuple) else record
        if isinstance(inside, dict) and part in inside:
            record = inside[part]
            yield str(part)
        elif missing and depth == len(location):
            yield str(part)


def check_rereadable(path: Path) -> None:
    """Refuses a pipe or a device, for work that reads its input more than once.

    Raises:
        InputError: If it is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError("is no regular file, and it is read twice", file=path, fix="save what comes from it first")


def lock(path: Path) -> IO[bytes]:
    """Takes the lock of a file or folder, which is held until what this returns is closed; it stands beside or in it.

    Raises:
        PopiError: If another process holds it.
        OSError: If it cannot be written.
    """
    import fcntl

    held = (path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")).open("ab")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise PopiError(f"{path} is being written by another process; wait for it or choose another place") from error
    if not os.fstat(held.fileno()).st_nlink:
        # Whoever held it before has removed it just now.
        held.close()
        return lock(path)
    return held


def writable(text: str) -> str:
    """A text with a replacement for what UTF-8 cannot write: halves of characters whose other half is missing."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def as_line(value: BaseModel) -> str:
    """One object as a line of JSON."""
    return value.model_dump_json() + "\n"


@contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path`` that takes its place only when everything went well.

    A link is followed, and the permissions of what is replaced are kept.

    Raises:
        InputError: If ``path`` is a folder, a device or a pipe.
        PopiError: If the disk is full or the place cannot be written; ``path`` is as it was.
    """
    if path.is_dir():
        raise InputError("is a folder", file=path, fix="name a file in it")
    if path.exists() and not path.is_file():
        raise InputError("is no regular file", file=path, fix="name one, or a new one")
    target = Path(os.path.realpath(path))
    temporary = target.with_name(UNFINISHED.replace("*", secrets.token_hex(6)))
    # Half a surrogate pair has no UTF-8; escaped, it is what JSON writes for it.
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
        # In the caller's lines only a lack of room is about this file; anything else there is for the caller to tell.
        if not ours and error.errno not in (ENOSPC, EDQUOT, EFBIG):
            raise
        raise PopiError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        PopiError: If it cannot be written.
    """
    with replacing(path) as stream:
        stream.write(text)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        PopiError: If it cannot be written.
    """
    with replacing(path, binary=True) as stream:
        stream.write(content)


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
