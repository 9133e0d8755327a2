"""Files of lines that grow while a command runs and outlive its death: what is finished is never done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from popi.errors import InputError, PopiError
from popi.io import lock


class GrowingFile:
    """A file to which whole lines are added durably, by one process at a time.

    Entering takes the lock and cuts off the half line that a killed process may have left at the end. Where no line
    came, nothing is left.

    Args:
        path: The file; it is made with the first lines. The lock stands beside it.

    Attributes:
        path: The file.
        repaired: Whether a half line was cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repaired = False
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Raises PopiError if another process writes the file, it cannot be written, or it is of another kind."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise InputError("is not a regular file", file=self.path, fix="name a regular file or a new one")
            self._lock = lock(self.path)
            if self.path.exists():
                self._repair()
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
        self._release()

    def append(self, lines: Iterable[str]) -> None:
        """Adds lines, each with its line end; they are on the disk when this returns.

        Raises:
            PopiError: If they cannot be written; none of them is in the file then.
        """
        data = "".join(lines).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    _write_all(file.fileno(), data)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def replace(self, lines: Mapping[int, str]) -> None:
        """Puts lines in the place of others, by their numbers from 1; the file changes as a whole or not at all.

        Raises:
            PopiError: If it cannot be written.
        """
        from popi.io import replacing

        if not lines:
            return
        with self.path.open(encoding="utf-8", newline="\n") as before, replacing(self.path) as after:
            after.writelines(lines.get(number, line) for number, line in enumerate(before, start=1))

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
                raise InputError("does not hold JSON lines", file=self.path, fix="name another file")

    def _release(self) -> None:
        if self._lock is not None:
            if not self.path.exists():
                Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def _start_of_last_line(file: IO[bytes], step: int = 1 << 16) -> int:
    """Where the text behind the last line end begins: the end of the file if it ends as it should."""
    position = file.seek(0, os.SEEK_END)
    while position:
        begin = max(0, position - step)
        file.seek(begin)
        found = file.read(position - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
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
