"""Several backends, of which the first that can serves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace

from popi.backends.base import Backend, Capabilities, ChatRequest, ChatResult, FailureKind, ScoreRequest, ScoreResult
from popi.backends.ledger import MILLION, Price
from popi.backends.together import held
from popi.backends.wrappers.base import Request, Result
from popi.backends.wrappers.breaker import Breaker
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

    async def stream(self, request: ChatRequest) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece; until the first one has come the next backend may be asked.

        Raises:
            BackendError: If no backend can serve, or an answer breaks off.
        """
        reasons: list[str] = []
        for route in self._routes:
            if not route.backend.capabilities.stream or not route.breaker.admit(1):
                continue
            begun = False
            try:
                with _watched(route):
                    async with held(route.backend.stream(request)) as pieces:
                        async for piece in pieces:
                            begun = True
                            yield piece
                _note(route, None, "")
                return
            except BackendError as error:
                _note(route, error.failure or "server", str(error), whole=error.failure not in OF_THE_REQUEST)
                if begun:
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
        for route in routes:
            waiting = [n for n in range(len(requests)) if n not in results or results[n].failure is not None]
            sent = waiting[: route.breaker.admit(len(waiting))]
            if not sent:
                continue
            try:
                with _watched(route):
                    answers = await ask(route.backend, [requests[n] for n in sent])
            except BackendError as error:
                _note(route, error.failure or "server", str(error), whole=True)
                reasons.append(f"{route.name}: {error}")
                continue
            for n, answer in zip(sent, answers, strict=True):
                _note(route, answer.failure, answer.error or "")
                results[n] = replace(answer, route=route.name)
        if requests and not results:
            raise self._nobody(reasons)
        lost = kind.failed("no backend is up", "unreachable", model=self.model)
        return [results.get(n, lost) for n in range(len(requests))]

    def _nobody(self, reasons: Sequence[str]) -> BackendError:
        return BackendError(f"no backend serves: {'; '.join(reasons) or 'all are out'}", failure="unreachable")


@contextmanager
def _watched(route: Route) -> Iterator[None]:
    """Gives a probe free that nobody waits for any more."""
    try:
        yield
    except BackendError:
        raise
    except BaseException:
        route.breaker.abandoned()
        raise


def _note(route: Route, failure: FailureKind | str | None, why: str, *, whole: bool = False) -> None:
    """Tells a route's breaker, and the log if that changes anything."""
    breaker, was = route.breaker, route.breaker.closed
    if failure is None:
        breaker.succeeded()
    elif failure in OF_THE_REQUEST and not whole:
        breaker.abandoned()
    else:
        breaker.failed()
    if was and not breaker.closed:
        log.warning("%s is out, and others serve: %s", route.name, why)
    elif breaker.closed and not was:
        log.warning("%s is back", route.name)
