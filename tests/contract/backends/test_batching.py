"""Concurrent calls, response prefixes and empty responses, on every backend."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from popi.backends.base import Backend, ChatRequest, ChatResult, ScoreRequest
from popi.errors import BackendError
from popi.prompts import Message

TEXTS = ["What is a good answer?", "How do I cook rice 🍚 quickly", "如何煮米饭用简单的话说", "Why? " * 20]


def ask(text: str, **options: object) -> ChatRequest:
    return ChatRequest([Message("user", text)], **{"max_tokens": 12, **options})


async def test_concurrent_calls_give_the_results_of_single_calls(backend: Backend) -> None:
    requests = [ask(f"{text} {n}", max_tokens=6 + 2 * n, temperature=n % 2, seed=n) for text in TEXTS for n in range(4)]
    ratings = [ScoreRequest(request.messages, "Yes.") for request in requests]
    chats = [backend.chat([request]) for request in requests]
    scores = [backend.score([rating]) for rating in ratings]
    together = await asyncio.gather(*chats, *scores)
    assert [result for [result] in together[:16]] == [(await backend.chat([request]))[0] for request in requests]
    apart = [(await backend.score([rating]))[0] for rating in ratings]
    assert [result.logprob for [result] in together[16:]] == pytest.approx([r.logprob for r in apart], abs=1e-3)


async def test_a_cancelled_call_leaves_concurrent_calls_as_they_are(backend: Backend) -> None:
    (expected,) = await backend.chat([ask(TEXTS[0])])
    doomed = [asyncio.create_task(backend.chat([ask(text, max_tokens=300)])) for text in TEXTS]
    call = asyncio.create_task(backend.chat([ask(TEXTS[0])]))
    await asyncio.sleep(0.01)
    for task in doomed:
        task.cancel()
    await asyncio.wait(doomed)
    assert await asyncio.wait_for(call, timeout=20) == [expected]


def test_several_threads_and_event_loops_share_a_backend(case) -> None:
    backend = case.make(512)
    requests = [ask(text) for text in TEXTS]
    expected = asyncio.run(backend.chat(requests))
    results: dict[int, list[ChatResult]] = {}

    def call(place: int) -> None:
        results[place] = asyncio.run(backend.chat([requests[place]]))

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(backend.close())
    assert [results[place] for place in range(len(requests))] == [[result] for result in expected]


async def test_a_response_starts_with_its_prefix(backend: Backend) -> None:
    request = ask(TEXTS[0], response_prefix="The user prefers")
    if not backend.capabilities.response_prefix:
        (refused,) = await backend.chat([request])
        assert refused.failure == "request" and refused.error and "\n" not in refused.error
        return
    whole = list[ChatResult]()
    pieces = [piece async for piece in backend.stream(request, whole.append)]
    (result,) = await backend.chat([request])
    assert result.text.startswith(request.response_prefix) and len(result.text) > len(request.response_prefix)
    assert result.completion_tokens <= request.max_tokens
    assert "".join(pieces) == result.text and whole == [result]
    # A stop string ends what follows the prefix, and is not looked for in it.
    (stopped,) = await backend.chat([replace(request, stop=("user", result.text[-1]))])
    assert stopped.text.startswith(request.response_prefix) or stopped.failure == "empty"
    assert result.text.startswith(stopped.text)


async def test_an_empty_response_is_a_failed_item(backend: Backend) -> None:
    (whole,) = await backend.chat([ask(TEXTS[0])])
    empty, fine = await backend.chat([ask(TEXTS[0], stop=tuple(whole.text.strip()[:1])), ask(TEXTS[0])])
    assert (empty.text, empty.finish_reason, empty.failure) == ("", "error", "empty")
    assert empty.error and "\n" not in empty.error
    assert fine == whole
    with pytest.raises(BackendError) as caught:
        async for _ in backend.stream(ask(TEXTS[0], stop=tuple(whole.text.strip()[:1]))):
            pass
    assert caught.value.failure == "empty"
