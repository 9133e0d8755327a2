"""No more goes out than is allowed, and everything gets its turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from popi.backends.base import ChatRequest, ChatResult, OnComplete, ScoreRequest, ignore_result
from popi.backends.wrappers import Limit, limit
from popi.errors import BackendError, ConfigError
from popi.prompts import Message
from popi.testing import ScriptedBackend

WORDS = " ".join(["word"] * 30)


def ask(text: str = "rice", max_tokens: int = 4) -> ChatRequest:
    return ChatRequest([Message("user", text)], max_tokens=max_tokens)


class Slow(ScriptedBackend):
    """Takes its time, and knows how many were there at once, and when they came."""

    now = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.came: list[float] = []

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        self.came.append(time.monotonic())
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1
        return await super().chat(requests)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        [result] = await self.chat([request])
        yield result.text


@pytest.fixture
def quick_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of half a second."""
    monkeypatch.setattr(limit, "MINUTE", 0.5)


async def test_so_many_at_once_and_no_more() -> None:
    limited = Limit(slow := Slow(), max_concurrency=3)
    requests = [ask(f"rice {n}") for n in range(10)]
    results, more, streamed = await asyncio.gather(
        limited.chat(requests), limited.chat(requests), anext(limited.stream(ask("tea")))
    )
    assert [result.text for result in results] == [result.text for result in more]
    assert results[7].text == "Noted: rice 7" and streamed == "Noted: tea"
    assert slow.most == 3


@pytest.mark.usefixtures("quick_minutes")
async def test_so_many_a_minute() -> None:
    limited = Limit(slow := Slow(), requests_per_minute=5)
    await limited.chat([ask()] * 11)
    # Five at once, and then one after every tenth of a second.
    assert slow.came[10] - slow.came[0] >= 0.55


@pytest.mark.usefixtures("quick_minutes")
async def test_so_many_tokens_a_minute() -> None:
    limited = Limit(slow := Slow(), tokens_per_minute=50)
    # Ten words and the forty of the answer fill a minute.
    await limited.chat([ask(WORDS[:49], max_tokens=40)] * 3)
    assert slow.came[1] - slow.came[0] >= 0.45 and slow.came[2] - slow.came[1] >= 0.45


async def test_what_no_minute_allows_is_an_error_in_its_result() -> None:
    limited = Limit(Slow(), tokens_per_minute=50)
    long, fine = await limited.chat([ask(WORDS[:54], max_tokens=40), ask()])
    assert long.failure == "request" and fine.error is None
    assert long.error == "the request has 51 tokens including max_tokens, and tokens_per_minute is 50"
    [score] = await limited.score([ScoreRequest([Message("user", WORDS)], WORDS)])
    assert score.failure == "request"
    with pytest.raises(BackendError, match="51 tokens"):
        await anext(limited.stream(ask(WORDS[:54], max_tokens=40)))


def test_one_limit_serves_one_event_loop_after_the_other() -> None:
    limited = Limit(Slow(), max_concurrency=1, requests_per_minute=100, tokens_per_minute=1000)
    for _ in range(2):
        assert [result.error for result in asyncio.run(limited.chat([ask()] * 3))] == [None] * 3


@pytest.mark.usefixtures("quick_minutes")
def test_a_minute_is_one_for_all_event_loops() -> None:
    limited = Limit(slow := Slow(), requests_per_minute=5)
    for _ in range(8):
        asyncio.run(limited.chat([ask()]))
    # Five at once, and then one after every tenth of a second.
    assert slow.came[7] - slow.came[0] >= 0.25


@pytest.mark.usefixtures("quick_minutes")
async def test_who_gives_up_gives_back() -> None:
    limited = Limit(Slow(), requests_per_minute=5)
    await limited.chat([ask()] * 5)
    impatient = asyncio.create_task(limited.chat([ask()] * 50))
    await asyncio.sleep(0.01)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    began = time.monotonic()
    await limited.chat([ask()])
    assert time.monotonic() - began < 0.4


@pytest.mark.parametrize("name", ["max_concurrency", "requests_per_minute", "tokens_per_minute"])
def test_a_limit_that_lets_nothing_through_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"field {name}: must be positive, got 0"):
        Limit(ScriptedBackend(), **{name: 0})
