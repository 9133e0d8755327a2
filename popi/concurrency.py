"""A background event loop for callers of any thread, event loop and forked process, and concurrent work on items."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from popi.backends.sharing import renew_after_fork
from popi.backends.together import closing
from popi.errors import BackendError, ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

BUFFERED = 16
"""Maximum number of results that wait for a slow reader."""

MAX_ERRORS_IN_A_ROW = 8
"""Minimum number of errors in a row after which a backend counts as not available."""

CLOSED = "closed while the request was running"


class BackgroundLoop:
    """An event loop in its own thread, on which the work of all callers runs.

    The work runs on one loop, so a caller that blocks its own event loop does not block the work. The thread starts
    with the first work. A forked child starts its own thread.
    """

    def __init__(self) -> None:
        self._inherited: list[object] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Drops the event loop of the parent process.

        The loop and its tasks are kept: closing them would change the polling of the parent, which shares it.
        """
        self._lock = threading.Lock()
        if self._loop is not None:
            self._inherited.append((self._loop, asyncio.all_tasks(self._loop), self._stop.detach()))
            self._loop = None

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine and blocks until it ends. Interrupting the wait cancels it.

        Raises:
            RuntimeError: If it is called on the thread of the loop itself, where it would wait forever.
            BackendError: If the loop is stopped.
        """
        if self._loop is not None and self._loop is _running_loop():
            work.close()
            raise RuntimeError("a blocking method was called inside the work that it would wait for; use await")
        future = self._submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise BackendError(CLOSED) from None
        finally:
            future.cancel()

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine without blocking the event loop of the caller. Cancelling the caller cancels it.

        Raises:
            BackendError: If the loop is stopped.
        """
        try:
            return await asyncio.wrap_future(self._submit(work))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise BackendError(CLOSED) from None

    async def iterate(self, items: AsyncIterator[Item]) -> AsyncGenerator[Item]:
        """Iterates on the loop, and yields the items to the caller. Closing the generator closes ``items`` first.

        Raises:
            BackendError: If the loop is stopped.
        """
        here, arrived, over = asyncio.get_running_loop(), asyncio.Queue[tuple[Item] | None](), asyncio.Event()
        room = asyncio.Semaphore(BUFFERED)
        task: asyncio.Task[None]

        async def read() -> None:
            async with closing(items):
                async for item in items:
                    await room.acquire()
                    _call(here, arrived.put_nowait, (item,))

        def end(_: object) -> None:
            _call(here, arrived.put_nowait, None)
            _call(here, over.set)

        def start() -> None:
            nonlocal task
            task = asyncio.create_task(read())
            task.add_done_callback(end)

        with self._lock:
            loop = self._started()
            loop.call_soon_threadsafe(start)
        try:
            while (item := await arrived.get()) is not None:
                yield item[0]
                _call(loop, room.release)
            if task.cancelled():
                raise BackendError(CLOSED)
            if (error := task.exception()) is not None:
                raise error
        finally:
            _call(loop, lambda: task.cancel())
            await over.wait()

    def stop(self) -> None:
        """Cancels all work and ends the thread. Later work starts another."""
        with self._lock:
            if self._loop is None:
                return
            self._loop, thread = None, self._thread
            self._stop()
        if thread is not threading.current_thread():
            thread.join()

    def _submit(self, work: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        with self._lock:
            return asyncio.run_coroutine_threadsafe(work, self._started())

    def _started(self) -> asyncio.AbstractEventLoop:
        """The running loop. Work that is submitted while the lock is held is scheduled before a later stop."""
        if self._loop is None or self._loop.is_closed():
            ready = concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]()
            self._thread = threading.Thread(target=_serve, args=(ready,), name="popi-loop", daemon=True)
            self._thread.start()
            self._loop, stopped = ready.result()
            # Stops the loop also when this object is garbage-collected.
            self._stop = weakref.finalize(self, _call, self._loop, stopped.set)
            self._stop.atexit = False
        return self._loop


def _serve(ready: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    with asyncio.Runner() as runner:
        stopped = asyncio.Event()
        ready.set_result((runner.get_loop(), stopped))
        runner.run(_until(stopped))


async def _until(stopped: asyncio.Event) -> None:
    await stopped.wait()


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *values: object) -> None:
    """Runs a callback on a loop of another thread, unless that loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *values)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


async def as_completed(
    items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], *, max_concurrency: int
) -> AsyncGenerator[tuple[Item, Result]]:
    """Works on several items at the same time, and yields each one with its result as soon as it is finished.

    An item is read when fewer than ``max_concurrency`` items are in progress, before the results of others are yielded.
    An error of the work cancels the work on all other items. After an error of ``items`` the work on earlier items
    finishes. Either error is raised after all finished results have been yielded.

    Args:
        items: The items.
        work: Processes one item.
        max_concurrency: Maximum number of items at the same time.

    Yields:
        An item and its result.

    Raises:
        ConfigError: If ``max_concurrency`` is not positive.
    """
    if max_concurrency < 1:
        raise ConfigError(f"must be positive, got {max_concurrency}", field="max_concurrency")
    waiting, running = iter(items), dict[asyncio.Task[Result], Item]()
    # asyncio.wait would touch all running tasks for each one that ends.
    ended = asyncio.Queue[asyncio.Task[Result]]()
    error: BaseException | None = None

    def start() -> None:
        nonlocal error
        try:
            for item in islice(waiting if error is None else (), max_concurrency - len(running)):
                task = asyncio.create_task(_awaited(work, item))
                task.add_done_callback(ended.put_nowait)
                running[task] = item
        except Exception as failure:
            error = failure

    try:
        start()
        while running:
            done = [await ended.get()]
            while not ended.empty():
                done.append(ended.get_nowait())
            if errors := [reason for task in done if (reason := _error_of(task))]:
                error = error or errors[0]
                await _ended(running)
                done = list(running)
            finished = [(running.pop(task), task) for task in done]
            start()
            for item, task in finished:
                if _error_of(task) is None:
                    yield item, task.result()
        if error is not None:
            raise error
    finally:
        await _ended(running)


async def attempts(
    items: Iterable[Item],
    work: Callable[[Item], Awaitable[Result]],
    failed: Callable[[Item, BackendError], Result],
    *,
    max_concurrency: int,
) -> AsyncGenerator[tuple[Item, Result]]:
    """Works on items as :func:`as_completed`. An error of one item is data, unless the backend is not available.

    Args:
        items: The items.
        work: Processes one item.
        failed: Makes the result of an item from its error.
        max_concurrency: Maximum number of items at the same time.

    Yields:
        An item and its result.

    Raises:
        BackendError: If an error concerns all items, too many items in a row have one, or all items have one.
    """
    errors_in_a_row, responds = 0, False
    unsure: list[tuple[Item, BackendError]] = []

    async def attempt(item: Item) -> Result | BackendError:
        nonlocal errors_in_a_row
        try:
            result = await work(item)
        except BackendError as error:
            errors_in_a_row += 1
            if error.failure in (None, "denied") or errors_in_a_row >= max(max_concurrency, MAX_ERRORS_IN_A_ROW):
                raise
            return error
        errors_in_a_row = 0
        return result

    async with closing(as_completed(items, attempt, max_concurrency=max_concurrency)) as results:
        async for item, result in results:
            if isinstance(result, BackendError):
                unsure.append((item, result))
            else:
                responds = True
                yield item, result
            while responds and unsure:
                other, error = unsure.pop(0)
                yield other, failed(other, error)
    if unsure:
        raise unsure[0][1]


async def in_groups(items: AsyncIterator[Item]) -> AsyncGenerator[list[Item]]:
    """Yields items in groups: all that are available, at least one and at most ``BUFFERED``.

    It is for a caller whose work has a fixed cost for each call, such as ``fsync``. An error of ``items`` is raised
    after all earlier items have been yielded. Closing the generator closes ``items`` first.
    """
    arrived, room = asyncio.Queue[tuple[Item] | None](), asyncio.Semaphore(BUFFERED)

    async def read() -> None:
        async with closing(items):
            async for item in items:
                await room.acquire()
                arrived.put_nowait((item,))

    task = asyncio.create_task(read())
    task.add_done_callback(lambda _: arrived.put_nowait(None))
    group: list[Item] = []
    try:
        while (item := await arrived.get()) is not None:
            group.append(item[0])
            room.release()
            if arrived.empty():
                yield group
                group = []
        if group:
            yield group
        await task
    finally:
        await _ended([task])


async def _awaited(work: Callable[[Item], Awaitable[Result]], item: Item) -> Result:
    return await work(item)


def _error_of(task: asyncio.Task[Result]) -> BaseException | None:
    return BackendError(CLOSED) if task.cancelled() else task.exception()


async def _ended(tasks: Iterable[asyncio.Task[Result]]) -> None:
    """Cancels tasks, and waits until all have ended."""
    tasks = set(tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
