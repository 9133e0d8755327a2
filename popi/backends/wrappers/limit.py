"""Keeps to what a server allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from aiolimiter import AsyncLimiter

from popi.backends.base import Backend, ChatRequest, ScoreRequest
from popi.backends.together import held
from popi.backends.wrappers.base import OneByOne, Request, Result
from popi.errors import BackendError, ConfigError

MINUTE = 60.0


class Limit(OneByOne):
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

    async def one(self, request: Request, ask: Callable[[], Awaitable[Result]], kind: type[Result]) -> Result:
        """Waits for a turn; a request for which no minute has room is refused."""
        size = self._size(request)
        if error := self._too_much(size):
            return kind.failed(error, "request", model=self.model)
        async with self._gates().passed(size):
            return await ask()

    async def stream(self, request: ChatRequest) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece.

        Raises:
            BackendError: If the answer cannot be had or breaks off, or no minute allows for it.
        """
        size = self._size(request)
        if error := self._too_much(size):
            raise BackendError(f"{self.model}: {error}", failure="request")
        async with self._gates().passed(size), held(self.inner.stream(request)) as pieces:
            async for piece in pieces:
                yield piece

    def _size(self, request: ChatRequest | ScoreRequest) -> int:
        """In tokens; nothing is counted that nothing depends on."""
        if self._tokens is None:
            return 0
        read = sum(self.count_tokens(message.content) for message in request.messages)
        return read + (request.max_tokens if isinstance(request, ChatRequest) else self.count_tokens(request.response))

    def _too_much(self, size: int) -> str | None:
        if self._tokens is None or size <= self._tokens:
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
