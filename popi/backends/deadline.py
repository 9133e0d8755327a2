"""A deadline that waiting for a turn brings no nearer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar


class Clock:
    """Counts down the seconds of a request, and stands still while it waits for its turn.

    Args:
        timeout: What ends when they have passed.
    """

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout, self._waits, self._left = timeout, 0, 0.0

    @property
    def left(self) -> float:
        """Seconds that are left."""
        when = self._timeout.when()
        return self._left if when is None else when - asyncio.get_running_loop().time()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within it no time passes."""
        if not self._waits and not self._timeout.expired():
            self._left = self.left
            self._timeout.reschedule(None)
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits and not self._timeout.expired():
                self._timeout.reschedule(asyncio.get_running_loop().time() + self._left)


_RUNNING: ContextVar[Clock | None] = ContextVar("clock", default=None)


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[Clock]:
    """Gives what is done within it so many seconds, of which those do not count that :func:`waiting` covers.

    A thousand requests may be asked for at once and wait for each other: each has its time from when it is sent.

    Raises:
        TimeoutError: If they have passed.
    """
    async with asyncio.timeout(seconds) as timeout:
        token = _RUNNING.set(clock := Clock(timeout))
        try:
            yield clock
        finally:
            _RUNNING.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """Stops the clock of the request that waits for its turn within it, if one runs."""
    clock = _RUNNING.get()
    if clock is None:
        yield
    else:
        with clock.stopped():
            yield


@asynccontextmanager
async def turn(places: asyncio.Semaphore) -> AsyncIterator[None]:
    """Waits for a place, and holds it."""
    with waiting():
        await places.acquire()
    try:
        yield
    finally:
        places.release()
