"""Locks that survive ``os.fork``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import count
from types import TracebackType
from weakref import WeakSet


class ForkLock:
    """A reentrant lock that no other thread holds while the process forks.

    A child of ``os.fork`` has a copy of every lock, but only of the thread that called it: a lock that another thread
    held would never be released there. A fork therefore waits for these locks, and releases them in both processes.
    A thread that holds one may acquire only locks that were made before it.

    Args:
        before_fork: Called while the lock is held for a fork, to release what a child must not inherit.
    """

    def __init__(self, before_fork: Callable[[], None] | None = None) -> None:
        self._lock, self.before_fork = threading.RLock(), before_fork
        self.number = next(_numbers)
        with _making:
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
_making = threading.Lock()
_locks: WeakSet[ForkLock] = WeakSet()
_held: list[ForkLock] = []


def _acquire() -> None:
    _making.acquire()
    _held.extend(sorted(_locks, key=lambda lock: lock.number, reverse=True))
    for lock in _held:
        lock.__enter__()
    for lock in _held:
        if lock.before_fork is not None:
            lock.before_fork()


def _release() -> None:
    for lock in _held:
        lock.__exit__()
    _held.clear()
    _making.release()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)
