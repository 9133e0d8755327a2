"""Provenance of results: fingerprints, versions, the machine, and the check that settings have not changed."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popi.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


def fingerprint_files(path: Path) -> str | None:
    """Hashes one file, or the files directly in a folder.

    Returns:
        16 hex digits, or ``None`` if ``path`` does not exist. A model that is retrained in the same folder gets another
        fingerprint.
    """
    if path.is_file():
        return _hash_files([path])
    return _hash_files(sorted(file for file in path.iterdir() if file.is_file())) if path.is_dir() else None


def fingerprint_weights(weights: Mapping[str, Tensor]) -> str:
    """Hashes the names, shapes, dtypes and values of a model's weights; 16 hex digits.

    Args:
        weights: A state dict.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def check_unchanged(known: Mapping[str, Any], wanted: Mapping[str, Any], *, file: Path, fix: str) -> None:
    """Checks that the settings recorded with an earlier result are those of this run.

    Args:
        known: The recorded settings. A missing value equals ``None``.
        wanted: The settings of this run.
        file: The result with the recorded settings, named in the error.
        fix: What to do if they differ.

    Raises:
        InputError: If a setting differs. The first one is named, with both values.
    """
    difference = first_difference(dict(known), dict(wanted))
    if difference is not None:
        raise InputError(f"was made with {difference}", file=file, fix=fix)


def first_difference(known: object, wanted: object, at: str = "") -> str | None:
    """Names the first value that differs between two trees, as ``a.b 1, not 2``; ``None`` if they are equal.

    Args:
        known: The recorded value. A missing value equals ``None``.
        wanted: The present value.
        at: Dotted path of both.
    """
    if not (isinstance(known, dict) and isinstance(wanted, dict)):
        return f"{at} {known!r}, not {wanted!r}" if known != wanted else None
    for name in {**known, **wanted}:
        inner = first_difference(known.get(name), wanted.get(name), f"{at}.{name}" if at else name)
        if inner is not None:
            return inner
    return None


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """The versions of popi, Python and the given libraries. Libraries that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("popi", *libraries):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The Python version, the processor and the number of cores of this machine."""
    return {"python": platform.python_version(), "processor": _processor(), "cores": os.cpu_count()}


def now() -> str:
    """The time in UTC, to the minute, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="minutes")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
