"""What every wrapper passes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from popi.backends.base import Backend, ChatRequest, ChatResult, ScoreRequest, ScoreResult
from popi.backends.together import held


class Wrapper(Backend):
    """A backend that passes everything on to another one, and closes it.

    Args:
        inner: The other one.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.model, self.capabilities = inner.model, inner.capabilities

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """See :meth:`Backend.chat`."""
        return await self.inner.chat(requests)

    async def stream(self, request: ChatRequest) -> AsyncIterator[str]:
        """See :meth:`Backend.stream`."""
        async with held(self.inner.stream(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """See :meth:`Backend.score`."""
        return await self.inner.score(requests)

    def count_tokens(self, text: str) -> int:
        """See :meth:`Backend.count_tokens`."""
        return self.inner.count_tokens(text)

    async def close(self) -> None:
        """Closes the other one."""
        await self.inner.close()
