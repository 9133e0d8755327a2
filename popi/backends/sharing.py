"""Objects that several event loops, threads and forked processes can share.

An ``asyncio.Semaphore`` or future belongs to one event loop, and if a task holds a place during a fork, the child never
releases it. The classes of this module do not have these restrictions.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from popi.engine.forking import ForkLock

Value = TypeVar("Value")


class Forkable(Protocol):
    """An object with state that a forked child must not use."""

    def after_fork(self) -> None:
        """Drops connections, held places and waiting tasks. Runs in the child, before any other code."""


_FORKABLE: WeakSet[Any] = WeakSet()


def renew_after_fork(shared: Forkable) -> None:
    """Calls ``shared.after_fork()`` in every child process that is forked while ``shared`` exists."""
    _FORKABLE.add(shared)


def _renew_all() -> None:
    for shared in list(_FORKABLE):
        shared.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)


class Waiter:
    """Suspends the running task until any thread calls :meth:`wake`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = self._loop.create_future()

    def __await__(self) -> Generator[Any, None, None]:
        return self._woken.__await__()

    def wake(self) -> bool:
        """Resumes the task, and returns whether its event loop is still open."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake)
            return True
        return False

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)


class Semaphore:
    """A semaphore for tasks of any event loop. Tasks get their places in the order of their calls of :meth:`acquire`.

    Args:
        places: Number of tasks that can hold a place at the same time.
    """

    def __init__(self, places: int) -> None:
        self._places, self._lock = places, ForkLock()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Frees all places: the tasks that held them run in the parent process."""
        self._free, self._waiting = self._places, deque[Waiter]()

    async def acquire(self) -> None:
        """Takes a place, and waits until one is free."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            waiter = Waiter()
            self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            with self._lock:
                has_place = waiter not in self._waiting
                if not has_place:
                    self._waiting.remove(waiter)
            if has_place:
                self.release()
            raise

    def release(self) -> None:
        """Frees a place, or passes it on to the task that has waited longest."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                waiter = self._waiting.popleft()
            if waiter.wake():
                return


class PerLoop(Generic[Value]):
    """One value for each event loop, such as a client with its connections.

    Args:
        make: Makes the value of a loop.
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make, self._lock = make, ForkLock()
        self._values: WeakKeyDictionary[asyncio.AbstractEventLoop, Value] = WeakKeyDictionary()
        self._inherited: list[object] = []
        renew_after_fork(self)

    def get(self) -> Value:
        """Returns the value of the running loop, and makes it at the first call."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._values:
                self._values[loop] = self._make()
            return self._values[loop]

    def clear(self) -> dict[asyncio.AbstractEventLoop, Value]:
        """Removes and returns the values of all loops."""
        with self._lock:
            values = dict(self._values)
            self._values.clear()
        return values

    def after_fork(self) -> None:
        """Drops the values of the parent process without running their finalizers: the parent still uses them."""
        self._inherited.append(self._values)
        self._values = WeakKeyDictionary()
