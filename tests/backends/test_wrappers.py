"""What every wrapper owes to the backend that it stands around."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from popi.backends.base import Backend, ChatRequest
from popi.backends.ledger import Ledger, Price
from popi.backends.wrappers import Cache, Cost, Fallback, Limit, Retry, Route, Wrapper
from popi.prompts import Message
from popi.testing import ScriptedBackend


class Counting(ScriptedBackend):
    """Knows how many of its streams are open."""

    streams = 0

    async def stream(self, request: ChatRequest) -> AsyncIterator[str]:
        self.streams += 1
        try:
            async for piece in super().stream(request):
                yield piece
        finally:
            self.streams -= 1


WRAPPERS: dict[str, Callable[[Backend], Backend]] = {
    "wrapper": Wrapper,
    "retry": Retry,
    "limit": Limit,
    "cache": lambda inner: Cache(inner, Path(":memory:")),
    "cost": lambda inner: Cost(inner, price=Price(), ledger=Ledger()),
    "fallback": lambda inner: Fallback([Route("one", inner)]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
async def test_a_stream_that_is_left_is_closed_behind_the_wrapper(wrap: Callable[[Backend], Backend]) -> None:
    backend = wrap(counting := Counting())
    stream = backend.stream(ChatRequest([Message("user", "a long question")]))
    assert await anext(stream) and counting.streams == 1
    await stream.aclose()
    assert counting.streams == 0
