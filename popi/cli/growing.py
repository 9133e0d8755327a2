"""Files of lines that grow while a command runs. A killed command loses no finished line, and repeats none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from popi.errors import InputError, PopiError
from popi.io import lock


class GrowingFile:
    """A file of JSON lines that one process at a time extends. It is a context manager.

    Entering locks the file and removes the incomplete line that a killed process may have left at its end. New lines
    are on the disk when the call returns, with one ``fsync`` for all of them. Replacements of earlier lines are
    written to a file next to it, and take their places at the end, or when the file is entered again after the process
    was killed. Without any line, the file is removed.

    Args:
        path: The file. It is created with the first line. The lock is next to it.

    Attributes:
        path: The same.
        repaired: Whether an incomplete line was removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repaired = False
        self._changes = path.with_name(f".{path.name}.changes")
        self._digests: list[str] | None = None
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Raises LockedError if another process writes the file, PopiError if it has another format or is read-only."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise InputError("is not a regular file", file=self.path, fix="name a regular file or a new one")
            self._lock = lock(self.path)
            if self.path.exists():
                self._repair()
            self._apply_changes()
        except OSError as error:
            self._release()
            raise _cannot_write(self.path, error) from error
        except PopiError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._apply_changes()
        except PopiError:
            # The changes are kept, and made the next time.
            if error is None:
                raise
        finally:
            self._release()

    def append(self, lines: Iterable[str]) -> None:
        """Adds lines, each with its line end.

        Raises:
            PopiError: If they cannot be written. The file contains none of them then.
        """
        self._append(self.path, lines)

    def replace(self, number: int, line: str) -> None:
        """Replaces a line, unless another program changes it before the end.

        Args:
            number: Number of the line, starting at 1.
            line: The new line with its line end.

        Raises:
            PopiError: If it cannot be written. The file is unchanged then.
        """
        if self._digests is None:
            with self.path.open("rb") as file:
                self._digests = [_digest(old) for old in file]
        change = {"number": number, "old": self._digests[number - 1], "line": line}
        self._append(self._changes, [json.dumps(change) + "\n"])

    def _append(self, path: Path, lines: Iterable[str]) -> None:
        data = "".join(lines).encode()
        if not data:
            return
        try:
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    _write_all(file.fileno(), data)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _apply_changes(self) -> None:
        from popi.io import replacing

        if not self._changes.exists():
            return
        with self._changes.open("rb") as changes:
            places = {change["number"]: place for place, change in _changes_in(changes)}
            if places and self.path.exists():
                with self.path.open("rb") as before, replacing(self.path, binary=True) as after:
                    for number, line in enumerate(before, start=1):
                        after.write(_changed(line, changes, places[number]) if number in places else line)
        self._changes.unlink()

    def _repair(self) -> None:
        with self.path.open("r+b") as file:
            start = _start_of_last_line(file)
            file.seek(start)
            tail = file.read()
            if not tail:
                return
            if _is_json(tail):
                file.write(b"\n")
            elif tail.startswith(b"{"):
                file.truncate(start)
                self.repaired = True
            else:
                raise InputError("is not a file of JSON lines", file=self.path, fix="name another file")

    def _release(self) -> None:
        if self._lock is not None:
            if not self.path.exists():
                Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def _changes_in(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The changes and where they start, without an incomplete one at the end."""
    place = 0
    for line in file:
        if line.endswith(b"\n"):
            yield place, json.loads(line)
        place += len(line)


def _changed(line: bytes, changes: IO[bytes], place: int) -> bytes:
    """The new line; the old one if another program changed it after it was read."""
    changes.seek(place)
    change = json.loads(changes.readline())
    new: bytes = change["line"].encode()
    return new if change["old"] == _digest(line) else line


def _digest(line: bytes) -> str:
    return hashlib.sha256(line.rstrip(b"\r\n")).hexdigest()[:16]


def _start_of_last_line(file: IO[bytes], step: int = 1 << 16) -> int:
    """Where the text after the last line end starts: at the end of the file if the last line is complete."""
    position = file.seek(0, os.SEEK_END)
    while position:
        begin = max(0, position - step)
        file.seek(begin)
        end = file.read(position - begin).rfind(b"\n")
        if end >= 0:
            return begin + end + 1
        position = begin
    return 0


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _cannot_write(path: Path, error: OSError) -> PopiError:
    return PopiError(f"cannot write {path}: {error.strerror or error}")
