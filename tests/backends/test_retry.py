"""Asking again: what is repeated, when, and for how long."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from popi.backends.base import TRANSIENT, ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult, ignore_result
from popi.backends.ledger import Ledger, Price
from popi.backends.wrappers import Cost, Limit, Retry, limit
from popi.errors import BackendError, ConfigError
from popi.prompts import Message
from popi.testing import ScriptedBackend


def ask(text: str) -> ChatRequest:
    return ChatRequest([Message("user", text)])


def failing(kind: str | None, after: float | None = None) -> ChatResult:
    return ChatResult("", "error", error="not now", failure=kind, retry_after=after)  # type: ignore[arg-type]


class Flaky(ScriptedBackend):
    """Fails in given ways before it answers; an exception is raised, and ``None`` is no failure."""

    def __init__(self, *failures: ChatResult | BackendError | None) -> None:
        self.failures = list(failures)
        self.asked: list[float] = []
        super().__init__(self._reply, self._rate)

    def _fail(self) -> ChatResult | None:
        self.asked.append(time.monotonic())
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, BackendError):
            raise failure
        return failure

    def _reply(self, request: ChatRequest) -> str | ChatResult:
        return self._fail() or "Rice."

    def _rate(self, request: ScoreRequest) -> float | ScoreResult:
        failure = self._fail()
        return -1.0 if failure is None else ScoreResult(math.nan, 0, error=failure.error, failure=failure.failure)


@pytest.mark.parametrize("kind", sorted(TRANSIENT))
async def test_what_may_pass_is_asked_for_again(kind: str) -> None:
    flaky = Flaky(failing(kind), BackendError("down", failure=kind))
    [result] = await Retry(flaky, first=0.01).chat([ask("rice?")])
    assert result.text == "Rice." and len(flaky.asked) == 3
    flaky = Flaky(failing(kind))
    [score] = await Retry(flaky, first=0.01).score([ScoreRequest([Message("user", "rice?")], "Yes.")])
    assert score.logprob == -1.0 and len(flaky.asked) == 2


@pytest.mark.parametrize("kind", ["request", None])
async def test_what_cannot_pass_is_not(kind: str | None) -> None:
    flaky = Flaky(failing(kind))
    assert await Retry(flaky).chat([ask("rice?")]) == [failing(kind)]
    assert len(flaky.asked) == 1
    flaky = Flaky(BackendError("no such model", failure=kind))
    with pytest.raises(BackendError, match="no such model"):
        await Retry(flaky).chat([ask("rice?")])
    assert len(flaky.asked) == 1


async def test_after_the_last_attempt_the_last_failure_counts() -> None:
    flaky = Flaky(*[failing("server")] * 5)
    assert await Retry(flaky, attempts=3, first=0.01).chat([ask("rice?")]) == [failing("server")]
    assert len(flaky.asked) == 3


async def test_no_wait_is_shorter_than_the_server_wants() -> None:
    flaky = Flaky(failing("rate_limit", after=0.3), BackendError("busy", failure="server", retry_after=0.2))
    await Retry(flaky, first=0.001).chat([ask("rice?")])
    first, second, third = flaky.asked
    assert second - first >= 0.3 and third - second >= 0.2


async def test_what_would_come_after_the_deadline_is_not_waited_for() -> None:
    flaky = Flaky(failing("rate_limit", after=60))
    began = time.monotonic()
    assert await Retry(flaky, deadline=5).chat([ask("rice?")]) == [failing("rate_limit", after=60)]
    assert time.monotonic() - began < 2


async def test_an_answer_that_does_not_come_is_late_at_the_deadline() -> None:
    class Silent(ScriptedBackend):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            if requests[0].messages[0].content == "silence":
                await asyncio.sleep(60)
            return await super().chat(requests)

    late, fine = await Retry(Silent(), deadline=0.2).chat([ask("silence"), ask("rice?")])
    assert (late.failure, late.error) == ("timeout", "no response within 0.2 s")
    assert fine.error is None


class Steady(ScriptedBackend):
    """Answers after a seventh of a second."""

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        await asyncio.sleep(0.15)
        return await super().chat(requests)


@pytest.mark.parametrize("limits", [{"max_concurrency": 1}, {"requests_per_minute": 2}, {}], ids=str)
async def test_the_wait_for_a_turn_brings_no_deadline_nearer(
    limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, "MINUTE", 0.6)
    # One at a time has money, too.
    ledger = Ledger(cap=None if limits else 5.0)
    paid = Cost(Steady(lambda _: ChatResult("Rice.", "stop", 1, 0)), price=Price(10_000, 10_000), ledger=ledger)
    began = time.monotonic()
    results = await Retry(Limit(paid, **limits), deadline=1.2).chat([ask("rice?")] * 12)
    assert [result.error for result in results] == [None] * 12
    assert time.monotonic() - began > 1.5
    assert (ledger.total.requests, ledger.total.unsure) == (12, 0)


async def test_the_clock_goes_on_when_the_turn_has_come() -> None:
    class Stalled(Steady):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            await asyncio.sleep(60)
            return await super().chat(requests)

    began = time.monotonic()
    results = await Retry(Limit(Stalled(), max_concurrency=1), deadline=0.2).chat([ask("rice?")] * 3)
    assert [result.failure for result in results] == ["timeout"] * 3
    assert 0.55 <= time.monotonic() - began < 5


async def test_one_that_fails_holds_up_no_other() -> None:
    flaky = Flaky(failing("server"), None, None)
    results = await Retry(flaky, first=0.01).chat([ask("one"), ask("two"), ask("three")])
    assert [result.text for result in results] == ["Rice."] * 3
    assert [chat.messages[0].content for chat in flaky.chats] == ["one", "two", "three", "one"]


async def test_a_stream_that_has_not_begun_is_asked_for_again_and_one_that_has_is_not() -> None:
    class Breaking(ScriptedBackend):
        broken = 0

        async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
            self.broken += 1
            if self.broken == 1:
                raise BackendError("reset", failure="unreachable")
            yield "Ri"
            if request.messages[0].content == "break":
                raise BackendError("reset", failure="unreachable")
            yield "ce"

    backend = Retry(Breaking(), first=0.01)
    assert [piece async for piece in backend.stream(ask("rice?"))] == ["Ri", "ce"]
    pieces = []
    with pytest.raises(BackendError, match="reset"):
        async for piece in backend.stream(ask("break")):
            pieces.append(piece)
    assert pieces == ["Ri"] and backend.inner.broken == 3


async def test_a_cancelled_call_asks_no_more() -> None:
    flaky = Flaky(*[failing("server")] * 99)
    call = asyncio.create_task(Retry(flaky, attempts=99, first=0.01, longest=0.01).chat([ask("rice?")]))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    asked = len(flaky.asked)
    await asyncio.sleep(0.1)
    assert len(flaky.asked) == asked > 1


@pytest.mark.parametrize("options", [{"attempts": 0}, {"deadline": 0}, {"first": -1}])
def test_numbers_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"field {next(iter(options))}: must be positive"):
        Retry(ScriptedBackend(), **options)


async def test_a_stream_that_does_not_begin_in_time_is_given_up() -> None:
    class Stalled(ScriptedBackend):
        async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
            await asyncio.sleep(60)
            yield "too late"

    began = time.monotonic()
    with pytest.raises(BackendError, match=r"no response within 0\.1 s") as caught:
        await anext(Retry(Stalled(), deadline=0.1).stream(ask("rice?")))
    assert caught.value.failure == "timeout" and time.monotonic() - began < 5
