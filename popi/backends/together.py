"""Many coroutines at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from popi.backends.base import PASSING, ChatResult, FailureKind, ScoreResult
from popi.errors import BackendError

Result = TypeVar("Result")
Request = TypeVar("Request")
Served = TypeVar("Served", ChatResult, ScoreResult)


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Runs coroutines to their ends, at once, and gives their results in order.

    The first error stops the others and is raised as it is, not as one of a group.
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
    at_once: int | None = None,
) -> list[Served]:
    """Asks for each request by itself, and gives the results in order.

    One that finds the backend gone is data, unless none is served. An error that no other request would be spared, such
    as a key that is refused, stops those under way and leaves the rest unasked; what has been answered until then is
    kept, and the others have that error.

    Args:
        requests: The requests.
        ask: Has one answered.
        kind: What comes back, for results that are made here.
        model: Named in these.
        at_once: The most requests under way; ``None`` is all.

    Raises:
        BackendError: If nothing was served and the backend is gone, or the error is of no kind.
    """
    found: dict[int, Served | BackendError] = {}
    waiting, gone = iter(enumerate(requests)), None

    async def work() -> None:
        for place, request in waiting:
            try:
                found[place] = await ask(request)
            except BackendError as error:
                if error.failure not in PASSING:
                    raise
                found[place] = error

    try:
        await together(work() for _ in range(min(at_once or len(requests), len(requests))))
    except BackendError as error:
        if error.failure is None:
            raise
        gone = error
    errors = [outcome for outcome in found.values() if isinstance(outcome, BackendError)]
    served = any(not isinstance(outcome, BackendError) and outcome.failure is None for outcome in found.values())
    if gone is not None and not served:
        raise gone
    if errors and len(errors) == len(requests):
        raise errors[0]
    outcomes = [found.get(place, gone) for place in range(len(requests))]
    return [
        kind.failed(str(outcome), cast("FailureKind", outcome.failure), model=model, retry_after=outcome.retry_after)
        if isinstance(outcome, BackendError)
        else cast("Served", outcome)
        for outcome in outcomes
    ]


@asynccontextmanager
async def held(pieces: AsyncIterator[str]) -> AsyncIterator[AsyncIterator[str]]:
    """A stream that is closed when it is left: what waits behind it, a connection or a place, is given free at once."""
    try:
        yield pieces
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
