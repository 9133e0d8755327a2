"""Many requests at once, of which some fail."""

from __future__ import annotations

import asyncio

import pytest

from popi.backends.base import ChatResult
from popi.backends.together import each
from popi.errors import BackendError


async def asked(*ways: str, max_concurrency: int | None = None) -> list[ChatResult]:
    """Requests that go these ways; the first ones end first."""

    async def one(way: str) -> ChatResult:
        under_way.add(way)
        try:
            while ways[len(ended)] != way:
                await asyncio.sleep(0)
            # Time for an error of the one before to cancel this one.
            for _ in range(10):
                await asyncio.sleep(0)
        finally:
            under_way.discard(way)
            ended.append(way)
        if way.startswith("raises "):
            raise BackendError(way, failure=None if way == "raises nothing" else way.split()[1])
        if way.startswith("fails"):
            return ChatResult.failed(way, "request", model="m")
        return ChatResult(way, "stop")

    under_way, ended = set[str](), list[str]()
    try:
        return await each(ways, one, ChatResult, model="m", max_concurrency=max_concurrency)
    finally:
        assert not under_way


async def test_what_finds_nobody_spoils_no_other() -> None:
    one, lost, two = await asked("one", "raises unreachable", "two")
    assert (one.text, two.text) == ("one", "two")
    assert (lost.failure, lost.error, lost.model) == ("unreachable", "raises unreachable", "m")
    assert await asked() == []


@pytest.mark.parametrize("max_concurrency", [None, 1, 2])
async def test_what_is_answered_is_kept_when_the_rest_is_denied(max_concurrency: int | None) -> None:
    first, denied, *rest = await asked("one", "raises denied", "two", "three", max_concurrency=max_concurrency)
    assert first.text == "one"
    assert [result.failure for result in (denied, *rest)] == ["denied"] * 3


async def test_what_concerns_one_request_spoils_no_other() -> None:
    one, *others, two = await asked("one", "raises request", "raises empty", "raises budget", "two")
    assert (one.text, two.text) == ("one", "two")
    assert [result.failure for result in others] == ["request", "empty", "budget"]


@pytest.mark.parametrize(
    "ways",
    [
        ("raises unreachable", "raises timeout"),
        ("raises denied", "one"),
        ("fails", "raises denied", "one"),
        ("one", "raises nothing"),
    ],
)
async def test_where_nothing_was_served_or_nobody_knows_why_it_is_raised(ways: tuple[str, ...]) -> None:
    with pytest.raises(BackendError, match="raises"):
        await asked(*ways)


async def test_failures_of_requests_are_no_reason_to_raise() -> None:
    results = await asked("fails one", "fails two")
    assert [result.failure for result in results] == ["request"] * 2
