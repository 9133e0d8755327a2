"""Keeps requests within the limits of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext

from popi.backends.base import Backend, ChatRequest, OnComplete, ScoreRequest, ignore_result
from popi.backends.deadline import turn, waiting
from popi.backends.sharing import Semaphore
from popi.backends.together import closing
from popi.backends.wrappers.base import OneByOne, Request, Result
from popi.engine.forking import ForkLock
from popi.errors import BackendError, ConfigError

MINUTE = 60.0


class Limit(OneByOne):
    """Delays requests so that they stay within the limits of a server.

    The limits per minute are token buckets: the allowance may be used in one burst, and is refilled at a constant rate.
    Tokens are counted before a request is sent: those of its messages, and ``max_tokens`` for the response. All
    event loops and threads of a process share the limits.

    Example:
        >>> import asyncio
        >>> from popi.prompts import Message
        >>> from popi.testing import ScriptedBackend
        >>> backend = Limit(ScriptedBackend({"Hello": "Hi."}), max_concurrency=4, requests_per_minute=500)
        >>> [result] = asyncio.run(backend.chat([ChatRequest([Message("user", "Hello")])]))
        >>> result.text
        'Hi.'

    Args:
        inner: The backend.
        max_concurrency: Maximum number of requests at the same time.
        requests_per_minute: Maximum number of requests in a minute.
        tokens_per_minute: Maximum number of tokens in a minute.

    Raises:
        ConfigError: If a limit is not positive.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        max_concurrency: int | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        super().__init__(inner)
        limits = {
            "max_concurrency": max_concurrency,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ConfigError(f"must be positive, got {limit}", field=name)
        self._max_tokens = tokens_per_minute
        self._places = None if max_concurrency is None else Semaphore(max_concurrency)
        self._requests = None if requests_per_minute is None else _TokenBucket(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else _TokenBucket(tokens_per_minute)

    async def one(self, request: Request, ask: Callable[[], Awaitable[Result]], kind: type[Result]) -> Result:
        """Passes a request on when the limits allow it. One that exceeds the tokens of a minute fails."""
        size = self._size(request)
        if error := self._too_large(size):
            return kind.failed(error, "request", model=self.model)
        async with self._turn(size):
            return await ask()

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, and yields the text in pieces.

        Raises:
            BackendError: If the request fails or the stream breaks, or the request exceeds the tokens of a minute.
        """
        size = self._size(request)
        if error := self._too_large(size):
            raise BackendError(f"{self.model}: {error}", failure="request")
        async with self._turn(size), closing(self.inner.stream(request, on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    def _size(self, request: ChatRequest | ScoreRequest) -> int:
        """The tokens of a request; 0 if there is no limit for them, since counting takes time."""
        if self._max_tokens is None:
            return 0
        prompt = sum(self.count_tokens(message.content) for message in request.messages)
        if isinstance(request, ChatRequest):
            return prompt + self.count_tokens(request.response_prefix) + request.max_tokens
        return prompt + self.count_tokens(request.response)

    def _too_large(self, size: int) -> str | None:
        if self._max_tokens is None or size <= self._max_tokens:
            return None
        return f"the request has {size} tokens including max_tokens, and tokens_per_minute is {self._max_tokens}"

    @asynccontextmanager
    async def _turn(self, tokens: int) -> AsyncIterator[None]:
        """Waits until the limits allow a request, and holds its place during the block."""
        async with turn(self._places) if self._places else nullcontext():
            with waiting():
                if self._requests:
                    await self._requests.take(1)
                if self._tokens:
                    await self._tokens.take(tokens)
            yield


class _TokenBucket:
    """A token bucket: an amount that may be taken in a minute, and is refilled at a constant rate.

    Args:
        per_minute: The amount.
    """

    def __init__(self, per_minute: int) -> None:
        self._size, self._taken, self._at = per_minute, 0.0, time.monotonic()
        self._lock = ForkLock()

    async def take(self, amount: float) -> None:
        """Takes an amount, and waits until the bucket has been refilled that far. Earlier callers come first."""
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
