"""Keeps to what a server allows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from weakref import WeakKeyDictionary

from popi.backends.base import Backend, ChatRequest, OnComplete, ScoreRequest, ignore_result
from popi.backends.deadline import turn, waiting
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
        self._at_once, self._most_tokens = at_once, tokens_per_minute
        self._requests = None if requests_per_minute is None else _Allowance(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else _Allowance(tokens_per_minute)
        self._open: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def one(self, request: Request, ask: Callable[[], Awaitable[Result]], kind: type[Result]) -> Result:
        """Waits for a turn; a request for which no minute has room is refused."""
        size = self._size(request)
        if error := self._too_much(size):
            return kind.failed(error, "request", model=self.model)
        async with self._turn(size):
            return await ask()

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece.

        Raises:
            BackendError: If the answer cannot be had or breaks off, or no minute allows for it.
        """
        size = self._size(request)
        if error := self._too_much(size):
            raise BackendError(f"{self.model}: {error}", failure="request")
        async with self._turn(size), held(self.inner.stream(request, on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    def _size(self, request: ChatRequest | ScoreRequest) -> int:
        """In tokens; nothing is counted that nothing depends on."""
        if self._most_tokens is None:
            return 0
        read = sum(self.count_tokens(message.content) for message in request.messages)
        return read + (request.max_tokens if isinstance(request, ChatRequest) else self.count_tokens(request.response))

    def _too_much(self, size: int) -> str | None:
        if self._most_tokens is None or size <= self._most_tokens:
            return None
        return f"{size} tokens, its answer included, are more than the {self._most_tokens} of a minute"

    @asynccontextmanager
    async def _turn(self, tokens: int) -> AsyncIterator[None]:
        """Waits for a turn, and holds a place as long as it lasts."""
        async with turn(self._places()) if self._at_once else nullcontext():
            with waiting():
                if self._requests:
                    await self._requests.take(1)
                if self._tokens:
                    await self._tokens.take(tokens)
            yield

    def _places(self) -> asyncio.Semaphore:
        """Those of the running event loop: nobody waits in two."""
        assert self._at_once is not None
        return self._open.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._at_once))


class _Allowance:
    """What may be taken in a minute: all at once, and what was taken comes back evenly.

    It is one for all event loops, in whatever threads, unlike a limiter of one loop.
    """

    def __init__(self, of_a_minute: int) -> None:
        self._size, self._taken, self._at = of_a_minute, 0.0, time.monotonic()
        self._lock = threading.Lock()

    async def take(self, amount: float) -> None:
        """Waits until so much is there, behind those who came before."""
        if (missing := self._add(amount) - self._size) > 0:
            try:
                await asyncio.sleep(missing * MINUTE / self._size)
            except asyncio.CancelledError:
                self._add(-amount)
                raise

    def _add(self, amount: float) -> float:
        with self._lock:
            now = time.monotonic()
            back = (now - self._at) * self._size / MINUTE
            self._taken, self._at = max(0.0, max(0.0, self._taken - back) + amount), now
            return self._taken
