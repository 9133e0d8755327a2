"""Asks again."""

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

from popi.backends.base import PASSING, Backend, ChatRequest, ChatResult, OnComplete, ScoreResult, ignore_result
from popi.backends.deadline import Clock, within
from popi.backends.together import held
from popi.backends.wrappers.base import OneByOne, Request, Result
from popi.errors import BackendError, ConfigError

Anything = TypeVar("Anything")


class Retry(OneByOne):
    """Asks again where a failure may pass: a limit, a time-out, a server that fails or cannot be reached.

    Waits are drawn at random from a range that doubles with every attempt ("full jitter"), and are no shorter than what
    the server asks for. A request that cannot be served as it stands is not repeated, and neither is a stream that has
    begun. Every request is for itself: one that fails holds up no other.

    Args:
        inner: The backend that is asked.
        attempts: How often at most.
        deadline: Seconds until a request has its answer or its last failure, waits between attempts included; those for
            its turn among other requests do not count.
        first: Seconds of the range of the first wait.
        longest: The most seconds of the range of a wait.

    Raises:
        ConfigError: If a number makes no sense.
    """

    def __init__(
        self, inner: Backend, *, attempts: int = 6, deadline: float = 120.0, first: float = 0.5, longest: float = 30.0
    ) -> None:
        super().__init__(inner)
        if attempts < 1 or min(deadline, first, longest) <= 0:
            raise ConfigError(f"{attempts} attempts within {deadline} s, {first} to {longest} s apart, are none")
        self._attempts, self._deadline = attempts, deadline
        self._backoff = wait_random_exponential(multiplier=first, max=longest)

    async def one(self, request: Request, ask: Callable[[], Awaitable[Result]], kind: type[Result]) -> Result:
        """Asks until there is an answer, the failure is for good, or there is no time left."""
        try:
            async with within(self._deadline) as clock:
                return await self._again(ask, clock)
        except TimeoutError:
            return kind.failed(self._late(), "timeout", model=self.model)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece; until the first one has come it may be asked for again.

        Raises:
            BackendError: If the answer cannot be had, does not begin in time, or breaks off.
        """

        async def begin() -> tuple[AsyncIterator[str], str | None]:
            pieces = self.inner.stream(request, on_complete)
            return pieces, await anext(pieces, None)

        try:
            async with within(self._deadline) as clock:
                begun, piece = await self._again(begin, clock)
        except TimeoutError:
            raise BackendError(f"{self.model}: {self._late()}", failure="timeout") from None
        async with held(begun) as pieces:
            while piece is not None:
                yield piece
                piece = await anext(pieces, None)

    async def _again(self, ask: Callable[[], Awaitable[Anything]], clock: Clock) -> Anything:
        """Asks until it succeeds, fails for good, or there is no time left; the last outcome counts."""
        retrying = AsyncRetrying(
            stop=lambda state: state.attempt_number >= self._attempts or state.upcoming_sleep >= clock.left,
            wait=self._wait,
            retry=retry_if_result(_may_pass) | retry_if_exception(_may_pass),
            retry_error_callback=_last,
        )
        answer: Anything = await retrying(ask)
        return answer

    def _late(self) -> str:
        return f"no answer within {self._deadline:g} s"

    def _wait(self, state: RetryCallState) -> float:
        outcome = state.outcome
        assert outcome is not None
        told = getattr(outcome.exception() if outcome.failed else outcome.result(), "retry_after", None)
        return max(self._backoff(state), told or 0.0)


def _may_pass(outcome: object) -> bool:
    return isinstance(outcome, ChatResult | ScoreResult | BackendError) and outcome.failure in PASSING


def _last(state: RetryCallState) -> object:
    assert state.outcome is not None
    return state.outcome.result()
