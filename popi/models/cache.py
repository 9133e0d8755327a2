"""The cache of models: copies of GGUF files that were converted for transformers, and models that were downloaded."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

VERSION = 1
"""Version of the conversion. Copies of another version are not used."""


def root() -> Path:
    """The folder of the cache, ``popi/models`` in the user's cache directory. It may not exist."""
    # By the specification of XDG, a relative path is ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "popi" / "models"


def entries() -> list[Path]:
    """The folders of the models in the cache, sorted by name."""
    return sorted(config.parent for config in root().glob("*/config.json") if not config.parent.name.startswith("."))


def entry_of(file: Path) -> Path:
    """The folder of the converted copy of a GGUF file. It depends on the content of the file only, and may not exist.

    Raises:
        OSError: If the file cannot be read.
    """
    return root() / f"gguf-{VERSION}-{digest(file)[:32]}"


def digest(file: Path) -> str:
    """The sha256 of a file, which is computed again when its size or its time has changed.

    Raises:
        OSError: If the file cannot be read.
    """
    status = file.stat()
    return _digest(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def filling(entry: Path) -> Iterator[Path | None]:
    """Makes an entry of the cache: the block fills an empty folder, which becomes the entry if the block succeeds.

    One process at a time fills an entry; the others wait for it. What a killed process has left is removed.

    Args:
        entry: The folder of the entry.

    Yields:
        The folder to fill, or ``None`` if the entry exists.

    Raises:
        OSError: If the cache cannot be written.
    """
    import fcntl

    if entry.is_dir():
        yield None
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    with entry.with_name(f".{entry.name}.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if entry.is_dir():
            yield None
            return
        part = entry.with_name(f".{entry.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            os.replace(part, entry)
        finally:
            shutil.rmtree(part, ignore_errors=True)
