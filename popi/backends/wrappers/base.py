"""Base classes of wrappers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from popi.backends.base import Backend, ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult, ignore_result
from popi.backends.together import closing, each

Request = TypeVar("Request", ChatRequest, ScoreRequest)
Result = TypeVar("Result", ChatResult, ScoreResult)


class Wrapper(Backend):
    """A backend that passes all calls on to another one, and closes it.

    Args:
        inner: The other backend.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.model, self.capabilities = inner.model, inner.capabilities

    @property
    def identity(self) -> str:
        """See :attr:`Backend.identity`."""
        return self.inner.identity

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """See :meth:`Backend.chat`."""
        return await self.inner.chat(requests)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """See :meth:`Backend.stream`."""
        async with closing(self.inner.stream(request, on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """See :meth:`Backend.score`."""
        return await self.inner.score(requests)

    def count_tokens(self, text: str) -> int:
        """See :meth:`Backend.count_tokens`."""
        return self.inner.count_tokens(text)

    async def close(self) -> None:
        """Closes the other backend."""
        await self.inner.close()


class OneByOne(Wrapper):
    """A wrapper that processes requests separately and concurrently, so that none delays another."""

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """See :meth:`Backend.chat`."""
        return await self._each(requests, self.inner.chat, ChatResult)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """See :meth:`Backend.score`."""
        return await self._each(requests, self.inner.score, ScoreResult)

    async def _each(
        self,
        requests: Sequence[Request],
        ask: Callable[[Sequence[Request]], Awaitable[list[Result]]],
        kind: type[Result],
    ) -> list[Result]:
        return await each(
            requests, lambda request: self.one(request, partial(_alone, ask, request), kind), kind, model=self.model
        )

    @abstractmethod
    async def one(self, request: Request, ask: Callable[[], Awaitable[Result]], kind: type[Result]) -> Result:
        """Processes one request.

        Args:
            request: The request.
            ask: Passes it on.
            kind: The class of the result.

        Raises:
            BackendError: If the backend as a whole is not available.
        """


async def _alone(ask: Callable[[Sequence[Request]], Awaitable[list[Result]]], request: Request) -> Result:
    [result] = await ask([request])
    return result
