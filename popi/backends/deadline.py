"""Timeouts that exclude the time in which a request waits for its turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

from popi.backends.sharing import Semaphore


class Clock:
    """Counts down the time of a request, and can be paused.

    Args:
        timeout: The timeout that it pauses.
    """

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout, self._pauses, self._left = timeout, 0, 0.0

    @property
    def left(self) -> float:
        """Seconds until the timeout."""
        when = self._timeout.when()
        return self._left if when is None else when - asyncio.get_running_loop().time()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the clock inside the block."""
        if not self._pauses and not self._timeout.expired():
            self._left = self.left
            self._timeout.reschedule(None)
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses and not self._timeout.expired():
                self._timeout.reschedule(asyncio.get_running_loop().time() + self._left)


_RUNNING: ContextVar[Clock | None] = ContextVar("clock", default=None)


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[Clock]:
    """Limits the time of the block. Time inside :func:`waiting` does not count.

    If many requests start together and wait for each other, the time of each one starts when it is sent.

    Raises:
        TimeoutError: After ``seconds``.
    """
    async with asyncio.timeout(seconds) as timeout:
        token = _RUNNING.set(clock := Clock(timeout))
        try:
            yield clock
        finally:
            _RUNNING.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """Pauses the clock of the current request, if it has one."""
    clock = _RUNNING.get()
    if clock is None:
        yield
    else:
        with clock.paused():
            yield


@asynccontextmanager
async def turn(places: Semaphore) -> AsyncIterator[None]:
    """Holds a place of a semaphore. Waiting for it does not count towards the time of the request."""
    with waiting():
        await places.acquire()
    try:
        yield
    finally:
        places.release()
