"""All wrappers: calls are passed on, and the inner backend is closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from popi.backends.base import Backend, ChatRequest, ChatResult
from popi.backends.ledger import FREE, Ledger
from popi.backends.wrappers import Cache, Cost, Fallback, Limit, Retry, Route, Wrapper
from popi.errors import BackendError
from popi.prompts import Message
from popi.testing import ScriptedBackend

WRAPPERS: dict[str, Callable[[Backend], Backend]] = {
    "wrapper": Wrapper,
    "retry": Retry,
    "limit": Limit,
    "cache": lambda inner: Cache(inner, Path(":memory:")),
    "cost": lambda inner: Cost(inner, price=FREE, ledger=Ledger()),
    "fallback": lambda inner: Fallback([Route("one", inner)]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
async def test_a_stream_that_is_left_is_closed_behind_the_wrapper(wrap: Callable[[Backend], Backend]) -> None:
    backend = wrap(inner := ScriptedBackend())
    stream = backend.stream(ChatRequest([Message("user", "a long question")]))
    assert await anext(stream) and inner.streams == 1
    await stream.aclose()
    assert inner.streams == 0


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
async def test_a_stream_tells_its_whole_answer_through_the_wrapper(wrap: Callable[[Backend], Backend]) -> None:
    backend, request = wrap(ScriptedBackend()), ChatRequest([Message("user", "a long question")])
    whole = list[ChatResult]()
    pieces = [piece async for piece in backend.stream(request, whole.append)]
    [answer] = await backend.chat([request])
    assert whole == [answer] and "".join(pieces) == answer.text


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
async def test_a_wrapper_is_the_backend_that_it_wraps(wrap: Callable[[Backend], Backend]) -> None:
    inner = ScriptedBackend(model="one", context_length=50)
    backend = wrap(inner)
    assert (backend.model, backend.capabilities) == ("one", inner.capabilities)
    assert backend.identity == wrap(ScriptedBackend(model="one", context_length=50)).identity
    assert backend.identity != wrap(ScriptedBackend(model="two", context_length=50)).identity
    assert inner.identity in backend.identity


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
async def test_a_response_prefix_passes_a_wrapper(wrap: Callable[[Backend], Backend]) -> None:
    backend, request = wrap(ScriptedBackend()), ChatRequest([Message("user", "Why?")], response_prefix="So: ")
    [result] = await backend.chat([request])
    assert result.text == "So: Noted: Why?" == "".join([piece async for piece in backend.stream(request)])


@pytest.mark.parametrize("wrap", [partial(Retry, attempts=1), Limit], ids=["retry", "limit"])
async def test_a_request_that_finds_nobody_spoils_no_other(wrap: Callable[[Backend], Backend]) -> None:
    class Flaky(ScriptedBackend):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            if any("lost" in request.messages[0].content for request in requests):
                raise BackendError("nobody is there", failure="unreachable")
            return await super().chat(requests)

    backend = wrap(Flaky(lambda request: request.messages[0].content))
    asked = [ChatRequest([Message("user", text)]) for text in ("one", "lost", "two")]
    one, lost, two = await backend.chat(asked)
    assert (one.text, two.text) == ("one", "two")
    assert (lost.failure, lost.error) == ("unreachable", "nobody is there")
    with pytest.raises(BackendError, match="nobody is there"):
        await backend.chat(asked[1:2] * 2)
