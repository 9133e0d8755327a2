"""Keeps to what a server allows."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

from aiolimiter import AsyncLimiter

from popi.backends.base import Backend, ChatRequest, ChatResult, ScoreRequest, ScoreResult
from popi.backends.together import held, together
from popi.backends.wrappers.base import Wrapper
from popi.errors import BackendError, ConfigError

Request = TypeVar("Request", ChatRequest, ScoreRequest)
Result = TypeVar("Result", ChatResult, ScoreResult)

MINUTE = 60.0


class Limit(Wrapper):
    """Sends no more than a server allows; what is too much waits for its turn.

    A minute's worth may go out at once, after which the allowance comes back evenly. Tokens are counted before a
    request is sent: those of its messages and all that its answer may have.

    Args:
        inner: The backend that is asked.
        at_once: The most requests at a time.
        requests_per_minute: The most requests in a minute.
        tokens_per_minute: The most tokens in a minute.

    Raises:
        ConfigError: If a limit is not positive.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        at_once: int | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        super().__init__(inner)
        limits = {
            "at_once": at_once,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ConfigError(f"a limit of {limit} lets nothing through", field=name)
        self._at_once, self._requests, self._tokens = at_once, requests_per_minute, tokens_per_minute
        self._open: tuple[asyncio.AbstractEventLoop, _Gates] | None = None

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the backend as a whole cannot serve.
        """

        def refused(error: str) -> ChatResult:
            return ChatResult("", "error", model=self.model, error=error, failure="request")

        return await self._each(requests, self.inner.chat, refused)

    async def stream(self, request: ChatRequest) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece.

        Raises:
            BackendError: If the answer cannot be had or breaks off, or no minute allows for it.
        """
        if error := self._too_much(request):
            raise BackendError(f"{self.model}: {error}", failure="request")
        async with self._gates().passed(self._size(request)), held(self.inner.stream(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, end of turn included, given its conversation.

        Raises:
            BackendError: If the backend as a whole cannot serve.
        """
        return await self._each(
            requests, self.inner.score, lambda error: ScoreResult(math.nan, 0, error=error, failure="request")
        )

    async def _each(
        self,
        requests: Sequence[Request],
        ask: Callable[[Sequence[Request]], Awaitable[list[Result]]],
        refused: Callable[[str], Result],
    ) -> list[Result]:
        gates = self._gates()

        async def one(request: Request) -> Result:
            if error := self._too_much(request):
                return refused(error)
            async with gates.passed(self._size(request)):
                [result] = await ask([request])
                return result

        return await together(one(request) for request in requests)

    def _size(self, request: ChatRequest | ScoreRequest) -> int:
        read = sum(self.count_tokens(message.content) for message in request.messages)
        more = request.max_tokens if isinstance(request, ChatRequest) else self.count_tokens(request.response)
        return read + more

    def _too_much(self, request: ChatRequest | ScoreRequest) -> str | None:
        if self._tokens is None or (size := self._size(request)) <= self._tokens:
            return None
        return f"{size} tokens, its answer included, are more than the {self._tokens} of a minute"

    def _gates(self) -> _Gates:
        """Those of the running event loop: nobody waits in two."""
        loop = asyncio.get_running_loop()
        if self._open is None or self._open[0] is not loop:
            self._open = loop, _Gates(self._at_once, self._requests, self._tokens)
        return self._open[1]


class _Gates:
    """What a request passes on its way out."""

    def __init__(self, at_once: int | None, requests: int | None, tokens: int | None) -> None:
        self._at_once = asyncio.Semaphore(at_once) if at_once else None
        self._requests = AsyncLimiter(requests, MINUTE) if requests else None
        self._tokens = AsyncLimiter(tokens, MINUTE) if tokens else None

    @asynccontextmanager
    async def passed(self, tokens: int) -> AsyncIterator[None]:
        """Waits for a turn, and holds a place as long as it lasts."""
        async with AsyncExitStack() as places:
            if self._at_once:
                await places.enter_async_context(self._at_once)
            if self._requests:
                await self._requests.acquire()
            if self._tokens:
                await self._tokens.acquire(tokens)
            yield
