"""Failover between several backends."""

from __future__ import annotations

import json
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
from popi.backends.together import closing, together
from popi.backends.wrappers.base import Request, Result
from popi.backends.wrappers.breaker import Admission, Breaker
from popi.errors import BackendError, ConfigError

log = logging.getLogger(__name__)

OF_THE_REQUEST: frozenset[FailureKind] = frozenset({"request", "rate_limit", "empty", "budget", "withheld"})
"""Failures that do not mean that a backend is down."""


@dataclass(frozen=True, slots=True)
class Route:
    """One of several backends.

    Example:
        >>> from popi.testing import ScriptedBackend
        >>> route = Route("own", ScriptedBackend(), price=Price(prompt=0, completion=0))
        >>> route.name, route.breaker.closed
        ('own', True)

    Attributes:
        name: Its name in results and logs.
        backend: The backend.
        price: Price of its tokens; ``None`` if unknown.
        breaker: Keeps requests from it while it is down.
    """

    name: str
    backend: Backend
    price: Price | None = None
    breaker: Breaker = field(default_factory=Breaker)


class Fallback(Backend):
    """Tries several backends until one serves the request.

    If all routes have a price, the cheapest is tried first, and those of equal price in their order. If one has none,
    all are tried in their order: an unknown price is not a low one.

    A failed request goes to the next route that supports it. For example, a conversation that is too long for one model
    goes to a model with a longer context. A route that fails repeatedly is left out for a while (:class:`Breaker`).
    ``ChatResult.route`` names the route that served a request.

    It streams and scores if any route does. Other capabilities are those of all routes. The length of a text is its
    maximum number of tokens on any route.

    Example:
        >>> import asyncio
        >>> from popi.prompts import Message
        >>> from popi.testing import ScriptedBackend
        >>> own, api = ScriptedBackend({"Hello": "Hi."}), ScriptedBackend({"Hello": "Good day."})
        >>> own.dead = "connection refused"
        >>> backend = Fallback([Route("own", own), Route("api", api)])
        >>> [result] = asyncio.run(backend.chat([ChatRequest([Message("user", "Hello")])]))
        >>> result.text, result.route
        ('Good day.', 'api')

    Args:
        routes: The routes.

    Raises:
        ConfigError: If there is no route, or two have the same name.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        names = [route.name for route in routes]
        if not names or len({*names}) < len(names):
            raise ConfigError(f"routes must have different names, got {names}", field="routes")
        self._routes = _by_price(routes)
        self.model = " | ".join(dict.fromkeys(route.backend.model for route in self._routes))
        able = [route.backend.capabilities for route in routes]
        lengths = [each.context_length for each in able if each.context_length is not None]
        self.capabilities = Capabilities(
            stream=any(each.stream for each in able),
            score=any(each.score for each in able),
            context_length=min(lengths, default=None),
            response_prefix=all(each.response_prefix for each in able),
            interfaces=frozenset.intersection(*(each.interfaces for each in able)),
        )

    @property
    def identity(self) -> str:
        """The identities of all routes: any of them may serve a request."""
        return json.dumps([route.backend.identity for route in self._routes])

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If no route is available.
        """
        return await self._each(requests, self._routes, lambda backend, some: backend.chat(some), ChatResult)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Scores each response, including its end of turn, given its conversation.

        Raises:
            BackendError: If no route is available, or none returns log-probabilities.
        """
        able = [route for route in self._routes if route.backend.capabilities.score]
        if not able:
            raise BackendError(f"{self.model}: no route returns log-probabilities", failure="request")
        return await self._each(requests, able, lambda backend, some: backend.score(some), ScoreResult)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, and yields the text in pieces. The route may change until the first piece.

        Raises:
            BackendError: If no route is available, or the stream breaks.
        """
        reasons: list[str] = []
        for route in self._routes:
            if not route.backend.capabilities.stream or not (admission := route.breaker.admit(1)).count:
                continue
            begun = False

            def served(result: ChatResult, name: str = route.name) -> None:
                on_complete(replace(result, route=name))

            try:
                with _abandoned_on_cancel(route, admission):
                    async with closing(route.backend.stream(request, served)) as pieces:
                        async for piece in pieces:
                            begun = True
                            yield piece
                _note(route, admission, None, "")
                return
            except BackendError as error:
                _note(route, admission, error.failure or "server", str(error))
                # A response that was withheld is the response of this route.
                if begun or error.failure == "withheld":
                    raise
                reasons.append(f"{route.name}: {error}")
        raise self._unavailable(reasons)

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a plain text. Returns the maximum over all routes."""
        return max(route.backend.count_tokens(text) for route in self._routes)

    async def close(self) -> None:
        """Closes all backends, even if one fails to close."""
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
            # While one request probes a route, other routes serve the rest.
            await together(
                [by(first, admission, places[: admission.count], others), serve(places[admission.count :], others)]
            )

        async def by(route: Route, admission: Admission, places: Sequence[int], others: Sequence[Route]) -> None:
            if not places:
                return
            try:
                with _abandoned_on_cancel(route, admission):
                    answers = await ask(route.backend, [requests[place] for place in places])
            except BackendError as error:
                _note(route, admission, error.failure or "server", str(error), whole=True)
                reasons.append(f"{route.name}: {error}")
                await serve(places, others)
                return
            # Successes first: the order in which requests of a batch ended is unknown, and a success shows that the
            # route is up.
            for answer in sorted(answers, key=lambda answer: answer.failure is not None):
                _note(route, admission, answer.failure, answer.error or "")
            results.update(
                (place, replace(answer, route=route.name)) for place, answer in zip(places, answers, strict=True)
            )
            await serve([place for place in places if results[place].failure is not None], others)

        await serve(range(len(requests)), routes)
        if requests and not results:
            raise self._unavailable(reasons)
        lost = kind.failed("no route is available", "unreachable", model=self.model)
        return [results.get(n, lost) for n in range(len(requests))]

    def _unavailable(self, reasons: Sequence[str]) -> BackendError:
        return BackendError(
            f"no route is available: {'; '.join(reasons) or 'all circuits are open'}", failure="unreachable"
        )


def _by_price(routes: Sequence[Route]) -> list[Route]:
    prices = {route.name: route.price.of(MILLION, MILLION) for route in routes if route.price is not None}
    return list(routes) if len(prices) < len(routes) else sorted(routes, key=lambda route: prices[route.name])


@contextmanager
def _abandoned_on_cancel(route: Route, admission: Admission) -> Iterator[None]:
    """Allows another probe if this one is cancelled."""
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
    """Reports an outcome to the breaker of a route, and a change of its state to the log."""
    breaker, was_closed = route.breaker, route.breaker.closed
    if failure is None:
        breaker.succeeded(admission)
    elif failure in OF_THE_REQUEST and not whole:
        breaker.abandoned(admission)
    else:
        breaker.failed(admission)
    if was_closed and not breaker.closed:
        log.warning("route %s: circuit open, requests go to other routes: %s", route.name, why)
    elif breaker.closed and not was_closed:
        log.warning("route %s: circuit closed", route.name)
