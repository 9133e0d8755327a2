"""Locks that survive ``os.fork``."""

from __future__ import annotations

import os
import threading
from itertools import count
from types import TracebackType
from weakref import WeakSet


class ForkLock:
    """A reentrant lock that no other thread holds while the process forks.

    A child of ``os.fork`` has a copy of every lock, but only of the thread that called it: a lock that another thread
    held would never be released there. A fork therefore waits for these locks, and releases them in both processes.
    A thread that holds one may acquire only locks that were made before it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.number = next(_numbers)
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._lock.release()


_numbers = count()
_locks: WeakSet[ForkLock] = WeakSet()
_held: list[ForkLock] = []


def _acquire() -> None:
    _held.extend(sorted(_locks, key=lambda lock: lock.number, reverse=True))
    for lock in _held:
        lock.__enter__()


def _release() -> None:
    for lock in _held:
        lock.__exit__()
    _held.clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)
