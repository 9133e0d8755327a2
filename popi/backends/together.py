"""Many coroutines at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from popi.backends.base import ChatResult, FailureKind, ScoreResult
from popi.errors import BackendError

Result = TypeVar("Result")
Request = TypeVar("Request")
Served = TypeVar("Served", ChatResult, ScoreResult)


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Runs coroutines at the same time, and returns their results in order.

    The first error cancels the others and is raised by itself, not in a group.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def each(
    requests: Sequence[Request],
    ask: Callable[[Request], Awaitable[Served]],
    kind: type[Served],
    *,
    model: str,
    max_concurrency: int | None = None,
) -> list[Served]:
    """Processes each request separately, and returns the results in order.

    An error of one request is data in its result, unless all requests raise one. An error that concerns all requests,
    such as a rejected key, cancels the running requests, and the others are not sent. Finished results are kept, and
    all other requests get the error.

    Args:
        requests: The requests.
        ask: Processes one request.
        kind: Class of the results.
        model: Name of the model, for failed results.
        max_concurrency: Maximum number of requests at the same time; ``None`` is all.

    Raises:
        BackendError: If no request was served and the backend is not available, or an error has no kind.
    """
    outcomes: dict[int, Served | BackendError] = {}
    waiting, fatal = iter(enumerate(requests)), None

    async def work() -> None:
        for place, request in waiting:
            try:
                outcomes[place] = await ask(request)
            except BackendError as error:
                if error.failure in (None, "denied"):
                    raise
                outcomes[place] = error

    try:
        await together(work() for _ in range(min(max_concurrency or len(requests), len(requests))))
    except BackendError as error:
        if error.failure is None:
            raise
        fatal = error
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, BackendError)]
    served = any(not isinstance(outcome, BackendError) and outcome.failure is None for outcome in outcomes.values())
    if fatal is not None and not served:
        raise fatal
    if errors and len(errors) == len(requests):
        raise errors[0]
    complete = [outcomes.get(place, fatal) for place in range(len(requests))]
    return [
        kind.failed(str(outcome), cast("FailureKind", outcome.failure), model=model, retry_after=outcome.retry_after)
        if isinstance(outcome, BackendError)
        else cast("Served", outcome)
        for outcome in complete
    ]


@asynccontextmanager
async def closing(pieces: AsyncIterator[Result]) -> AsyncIterator[AsyncIterator[Result]]:
    """Closes a stream at the end of the block, so that its connection and its place are released immediately."""
    try:
        yield pieces
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
