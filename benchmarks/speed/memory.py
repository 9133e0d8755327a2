"""The memory of a process, for the benchmarks (Linux with glibc)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def return_freed_memory() -> None:
    """Makes glibc return large blocks immediately. Otherwise the measured memory varies by a quarter between runs."""
    mallopt, trim, mmap = ctypes.CDLL(None).mallopt, -1, -3
    for threshold in (trim, mmap):
        mallopt(threshold, 1 << 16)


def peak_growth(work: Callable[[], T]) -> tuple[T, float]:
    """The result of some work, and the peak of the resident memory during it, minus that before, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)
    # Resets the recorded peak, because loading a model needs more memory than the loaded model.
    Path("/proc/self/clear_refs").write_text("5")
    before = _held("VmRSS")
    result = work()
    return result, (_held("VmHWM") - before) / 1024


def _held(what: str) -> int:
    """Resident memory of this process in KiB: ``VmRSS`` is the present value, ``VmHWM`` the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{what}:")))
