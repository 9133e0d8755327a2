"""Repeats requests that fail for a transient reason."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    retry_if_result,
    wait_random_exponential,
)

from popi.backends.base import TRANSIENT, Backend, ChatRequest, ChatResult, OnComplete, ScoreResult, ignore_result
from popi.backends.deadline import Clock, within
from popi.backends.together import closing
from popi.backends.wrappers.base import OneByOne, Request, Result
from popi.errors import BackendError, ConfigError

Anything = TypeVar("Anything")


class Retry(OneByOne):
    """Repeats requests after transient failures: a rate limit, a timeout, a server that fails or is unreachable.

    Waits are drawn at random from a range that doubles with every attempt ("full jitter"), and are at least as long as
    the server requests. A request that the model cannot serve is not repeated, and neither is a stream after its first
    piece. Requests are retried independently: a failing request does not delay the others.

    Example:
        >>> import asyncio
        >>> from popi.prompts import Message
        >>> from popi.testing import ScriptedBackend
        >>> replies = iter([ChatResult.failed("too many requests", "rate_limit", model="m"), "Hi."])
        >>> backend = Retry(ScriptedBackend(lambda request: next(replies)), attempts=2, first=0.001)
        >>> [result] = asyncio.run(backend.chat([ChatRequest([Message("user", "Hello")])]))
        >>> result.text
        'Hi.'

    Args:
        inner: The backend.
        attempts: Maximum number of attempts.
        deadline: Seconds until a request must have its result, including waits between attempts, but not waits for a
            turn among other requests.
        first: Maximum of the first wait, in seconds.
        longest: Maximum of any wait, in seconds.

    Raises:
        ConfigError: If a number is not positive.
    """

    def __init__(
        self, inner: Backend, *, attempts: int = 6, deadline: float = 120.0, first: float = 0.5, longest: float = 30.0
    ) -> None:
        super().__init__(inner)
        numbers = {"attempts": attempts, "deadline": deadline, "first": first, "longest": longest}
        for name, value in numbers.items():
            if not value > 0:
                raise ConfigError(f"must be positive, got {value}", field=name)
        self._attempts, self._deadline = attempts, deadline
        self._backoff = wait_random_exponential(multiplier=first, max=longest)

    async def one(self, request: Request, ask: Callable[[], Awaitable[Result]], kind: type[Result]) -> Result:
        """Passes a request on until it succeeds, fails permanently, or runs out of time."""
        try:
            async with within(self._deadline) as clock:
                return await self._again(ask, clock)
        except TimeoutError:
            return kind.failed(self._late(), "timeout", model=self.model)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, and yields the text in pieces. It is repeated only before the first piece.

        Raises:
            BackendError: If the request fails, the first piece does not arrive before the deadline, or the stream
                breaks.
        """

        async def begin() -> tuple[AsyncIterator[str], str | None]:
            pieces = self.inner.stream(request, on_complete)
            return pieces, await anext(pieces, None)

        try:
            async with within(self._deadline) as clock:
                begun, piece = await self._again(begin, clock)
        except TimeoutError:
            raise BackendError(f"{self.model}: {self._late()}", failure="timeout") from None
        async with closing(begun) as pieces:
            while piece is not None:
                yield piece
                piece = await anext(pieces, None)

    async def _again(self, ask: Callable[[], Awaitable[Anything]], clock: Clock) -> Anything:
        """Calls ``ask`` until it succeeds, fails permanently, or the time is over, and returns the last outcome."""
        retrying = AsyncRetrying(
            stop=lambda state: state.attempt_number >= self._attempts or state.upcoming_sleep >= clock.left,
            wait=self._wait,
            retry=retry_if_result(_is_transient) | retry_if_exception(_is_transient),
            retry_error_callback=_last,
        )
        answer: Anything = await retrying(ask)
        return answer

    def _late(self) -> str:
        return f"no response within {self._deadline:g} s"

    def _wait(self, state: RetryCallState) -> float:
        outcome = state.outcome
        assert outcome is not None
        wanted = getattr(outcome.exception() if outcome.failed else outcome.result(), "retry_after", None)
        return max(self._backoff(state), wanted or 0.0)


def _is_transient(outcome: object) -> bool:
    return isinstance(outcome, ChatResult | ScoreResult | BackendError) and outcome.failure in TRANSIENT


def _last(state: RetryCallState) -> object:
    assert state.outcome is not None
    return state.outcome.result()
