"""Several backends, of which the first that can serves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace

from popi.backends.base import (
    Backend,
    Capabilities,
    ChatRequest,
    ChatResult,
    FailureKind,
    OnComplete,
    ScoreRequest,
    ScoreResult,
    ignore_result,
)
from popi.backends.ledger import MILLION, Price
from popi.backends.together import held, together
from popi.backends.wrappers.base import Request, Result
from popi.backends.wrappers.breaker import Admission, Breaker
from popi.errors import BackendError, ConfigError

log = logging.getLogger(__name__)

OF_THE_REQUEST: frozenset[FailureKind] = frozenset({"request", "rate_limit", "budget", "withheld"})
"""Failures that say nothing of the health of a backend."""


@dataclass(frozen=True, slots=True)
class Route:
    """One of several backends.

    Attributes:
        name: Names it in results and logs.
        backend: The backend.
        price: What its tokens cost; the cheapest is asked first.
        breaker: Keeps requests from it while it is down.
    """

    name: str
    backend: Backend
    price: Price = field(default_factory=Price)
    breaker: Breaker = field(default_factory=Breaker)


class Fallback(Backend):
    """Asks several backends in turn, the cheapest first and those of one price as they stand, until one has served.

    A request that fails goes to the next one that can do what is asked: a conversation too long for a small model to
    one of longer context, a score to one that gives log-probabilities. A backend that fails again and again is left
    alone for a while (:class:`Breaker`). Results say which one served them (``route``).

    What is made for all of them has to fit each: the context is the shortest of theirs, and a text has as many tokens
    as the one says that counts most.

    Args:
        routes: The backends.

    Raises:
        ConfigError: If there is none, or two have one name.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        names = [route.name for route in routes]
        if not names or len({*names}) < len(names):
            raise ConfigError(f"routes need names, each its own, and these are {names}", field="routes")
        self._routes = sorted(routes, key=lambda route: route.price.of(MILLION, MILLION))
        self.model = " | ".join(dict.fromkeys(route.backend.model for route in self._routes))
        able = [route.backend.capabilities for route in routes]
        lengths = [each.context_length for each in able if each.context_length is not None]
        self.capabilities = Capabilities(
            stream=any(each.stream for each in able),
            score=any(each.score for each in able),
            context_length=min(lengths, default=None),
        )

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If no backend can serve at all.
        """
        return await self._each(requests, self._routes, lambda backend, some: backend.chat(some), ChatResult)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, end of turn included, given its conversation.

        Raises:
            BackendError: If no backend can serve at all, or none gives log-probabilities.
        """
        able = [route for route in self._routes if route.backend.capabilities.score]
        if not able:
            raise BackendError(f"{self.model}: none of these gives log-probabilities", failure="request")
        return await self._each(requests, able, lambda backend, some: backend.score(some), ScoreResult)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece; until the first one has come the next backend may be asked.

        Raises:
            BackendError: If no backend can serve, or an answer breaks off.
        """
        reasons: list[str] = []
        for route in self._routes:
            if not route.backend.capabilities.stream or not (admission := route.breaker.admit(1)).count:
                continue
            begun = False

            def served(result: ChatResult, name: str = route.name) -> None:
                on_complete(replace(result, route=name))

            try:
                with _watched(route, admission):
                    async with held(route.backend.stream(request, served)) as pieces:
                        async for piece in pieces:
                            begun = True
                            yield piece
                _note(route, admission, None, "")
                return
            except BackendError as error:
                _note(route, admission, error.failure or "server", str(error))
                # What was withheld is the answer of this backend.
                if begun or error.failure == "withheld":
                    raise
                reasons.append(f"{route.name}: {error}")
        raise self._nobody(reasons)

    def count_tokens(self, text: str) -> int:
        """The length of a bare text for the one that counts most."""
        return max(route.backend.count_tokens(text) for route in self._routes)

    async def close(self) -> None:
        """Closes all of them, each whatever becomes of the others."""
        async with AsyncExitStack() as stack:
            for route in self._routes:
                stack.push_async_callback(route.backend.close)

    async def _each(
        self,
        requests: Sequence[Request],
        routes: Sequence[Route],
        ask: Callable[[Backend, Sequence[Request]], Awaitable[list[Result]]],
        kind: type[Result],
    ) -> list[Result]:
        results: dict[int, Result] = {}
        reasons: list[str] = []

        async def serve(places: Sequence[int], routes: Sequence[Route]) -> None:
            if not places or not routes:
                return
            first, *others = routes
            admission = first.breaker.admit(len(places))
            # While one of them probes a backend the rest is served elsewhere.
            await together(
                [by(first, admission, places[: admission.count], others), serve(places[admission.count :], others)]
            )

        async def by(route: Route, admission: Admission, places: Sequence[int], others: Sequence[Route]) -> None:
            if not places:
                return
            try:
                with _watched(route, admission):
                    answers = await ask(route.backend, [requests[place] for place in places])
            except BackendError as error:
                _note(route, admission, error.failure or "server", str(error), whole=True)
                reasons.append(f"{route.name}: {error}")
                await serve(places, others)
                return
            for place, answer in zip(places, answers, strict=True):
                _note(route, admission, answer.failure, answer.error or "")
                results[place] = replace(answer, route=route.name)
            await serve([place for place in places if results[place].failure is not None], others)

        await serve(range(len(requests)), routes)
        if requests and not results:
            raise self._nobody(reasons)
        lost = kind.failed("no backend is up", "unreachable", model=self.model)
        return [results.get(n, lost) for n in range(len(requests))]

    def _nobody(self, reasons: Sequence[str]) -> BackendError:
        return BackendError(f"no backend serves: {'; '.join(reasons) or 'all are out'}", failure="unreachable")


@contextmanager
def _watched(route: Route, admission: Admission) -> Iterator[None]:
    """Gives a probe free that nobody waits for any more."""
    try:
        yield
    except BackendError:
        raise
    except BaseException:
        route.breaker.abandoned(admission)
        raise


def _note(
    route: Route, admission: Admission, failure: FailureKind | str | None, why: str, *, whole: bool = False
) -> None:
    """Tells a route's breaker, and the log if that changes anything."""
    breaker, was = route.breaker, route.breaker.closed
    if failure is None:
        breaker.succeeded(admission)
    elif failure in OF_THE_REQUEST and not whole:
        breaker.abandoned(admission)
    else:
        breaker.failed(admission)
    if was and not breaker.closed:
        log.warning("%s is out, and others serve: %s", route.name, why)
    elif breaker.closed and not was:
        log.warning("%s is back", route.name)
