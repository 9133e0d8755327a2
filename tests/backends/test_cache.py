"""What is remembered, and what is not."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from popi.backends.base import ChatRequest, ChatResult, ScoreRequest, ScoreResult
from popi.backends.openai import OpenAIBackend
from popi.backends.wrappers import Cache
from popi.errors import BackendError, InputError
from popi.prompts import Message
from popi.testing import ScriptedBackend
from tests.faults import Scripted, Serve, piece


def ask(text: str, **options: object) -> ChatRequest:
    return ChatRequest([Message("user", text)], **options)


def numbered() -> ScriptedBackend:
    """Never gives the same answer twice."""
    numbers: Iterator[int] = iter(range(1000))
    return ScriptedBackend(lambda request: f"answer {next(numbers)} to {request.messages[0].content}")


async def test_what_was_answered_is_not_asked_again_by_whoever_comes(tmp_path: Path) -> None:
    requests = [ask("rice"), ask("tea", temperature=1.0, seed=3)]
    async with Cache(inner := numbered(), tmp_path / "sub" / "cache.sqlite") as cache:
        answers = await cache.chat(requests)
        assert await cache.chat(list(reversed(requests))) == answers[::-1]
        assert (cache.hits, cache.misses, len(inner.chats)) == (2, 2, 2)
        async with Cache(later := numbered(), tmp_path / "sub" / "cache.sqlite") as again:
            assert await again.chat([ask("more"), *requests]) == [
                ChatResult("answer 0 to more", "stop", 1, 4, "scripted"),
                *answers,
            ]
            assert "".join([piece async for piece in again.stream(requests[0])]) == answers[0].text
            assert len(later.chats) == 1


async def test_an_answer_that_was_streamed_to_its_end_is_kept(tmp_path: Path) -> None:
    async with Cache(inner := numbered(), tmp_path / "cache") as cache:
        left = cache.stream(ask("tea"))
        await anext(left)
        await left.aclose()
        whole = list[ChatResult]()
        text = "".join([piece async for piece in cache.stream(ask("rice"), whole.append)])
        assert [result.text for result in whole] == [text]
        assert await cache.chat([ask("rice")]) == whole
        assert [piece async for piece in cache.stream(ask("rice"), whole.append)] == [text] and len(whole) == 2
        assert (cache.hits, cache.misses, len(inner.chats)) == (2, 2, 2)


async def test_equal_requests_are_asked_once(tmp_path: Path) -> None:
    async with Cache(inner := numbered(), tmp_path / "cache") as cache:
        results = await cache.chat([ask("rice"), ask("tea"), ask("rice"), ask("rice")])
        assert results[0] == results[2] == results[3] != results[1]
        assert (cache.hits, len(inner.chats)) == (2, 2)


async def test_a_sample_without_a_seed_is_drawn_anew(tmp_path: Path) -> None:
    async with Cache(numbered(), tmp_path / "cache") as cache:
        first, second = await cache.chat([ask("rice", temperature=1.0)] * 2)
        assert first != second
        assert (await cache.chat([ask("rice", temperature=1.0)]))[0].text == "answer 2 to rice"


async def test_a_full_disk_costs_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Cache(inner := numbered(), file := tmp_path / "cache") as cache:
        await cache.chat([ask("rice")])
        cache._connection().execute("PRAGMA query_only = 1")
        results = await cache.chat([ask("rice"), ask("tea"), ask("milk")])
        assert [result.text for result in results] == ["answer 0 to rice", "answer 1 to tea", "answer 2 to milk"]
        [told] = caplog.messages
        assert told.startswith(f"{file}: results are no longer stored: ")
        cache._connection().execute("PRAGMA query_only = 0")
        assert (await cache.chat([ask("tea")]))[0].text == "answer 3 to tea"
        assert (await cache.chat([ask("tea")]))[0].text == "answer 3 to tea" and len(inner.chats) == 4


async def test_a_file_that_is_closed_or_broken_is_a_dead_backend(tmp_path: Path) -> None:
    cache = Cache(numbered(), tmp_path / "cache")
    cache._connection().execute("DROP TABLE results")
    with pytest.raises(BackendError, match="cannot be read"):
        await cache.chat([ask("rice")])
    await cache.close()
    with pytest.raises(BackendError, match="the cache is closed"):
        await cache.chat([ask("rice")])


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 9}, {"top_p": 0.5}, {"stop": ("x",)}, {"seed": 1}, {"messages": [Message("user", "Rice")]}],
)
async def test_everything_that_decides_an_answer_finds_it(tmp_path: Path, change: dict) -> None:
    async with Cache(inner := numbered(), tmp_path / "cache") as cache:
        await cache.chat([ask("rice")])
        await cache.chat([replace(ask("rice"), **change)])
        assert len(inner.chats) == 2


async def test_another_model_has_answers_of_its_own(tmp_path: Path) -> None:
    for model in ("one", "two"):
        inner = ScriptedBackend(lambda request, model=model: model, model=model)
        async with Cache(inner, tmp_path / "cache") as cache:
            assert (await cache.chat([ask("rice")]))[0].text == model


async def test_the_same_name_at_another_address_has_answers_of_its_own(serve: Serve, tmp_path: Path) -> None:
    for text in ("one", "two"):
        inner = OpenAIBackend("m", base_url=serve(Scripted([piece(text, "stop")])).url, key=None)
        async with Cache(inner, tmp_path / "cache") as cache:
            assert (await cache.chat([ask("rice")]))[0].text == text
            assert [each async for each in cache.stream(ask("rice"))] == [text] and cache.hits == 1


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
async def test_a_score_that_is_not_finite_is_not_kept(tmp_path: Path, score: float) -> None:
    request = ScoreRequest([Message("user", "rice")], "Yes.")
    scores = iter([ScoreResult(score, 1, model="scripted"), ScoreResult(-1.0, 1, model="scripted")])

    class Careless(ScriptedBackend):
        async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
            return [next(scores) for _ in requests]

    async with Cache(Careless(), tmp_path / "cache") as cache:
        await cache.score([request])
        assert (await cache.score([request]))[0].logprob == -1.0 and cache.hits == 0


async def test_an_entry_that_cannot_be_read_is_asked_for_again(tmp_path: Path) -> None:
    for entry in ("{", '"text"', '{"words": 1}'):
        async with Cache(inner := numbered(), tmp_path / "cache") as cache:
            await cache.chat([ask("rice")])
            cache._connection().execute("UPDATE results SET result = ?", (entry,))
            assert (await cache.chat([ask("rice")]))[0].text == f"answer {len(inner.chats) - 1} to rice"


async def test_failures_are_not_kept(tmp_path: Path) -> None:
    failure = ChatResult("", "error", error="not now", failure="server")
    outcomes: Iterator[str | ChatResult] = iter([failure, "Rice."])
    async with Cache(ScriptedBackend(lambda request: next(outcomes)), tmp_path / "cache") as cache:
        assert await cache.chat([ask("rice")]) == [failure]
        assert (await cache.chat([ask("rice")]))[0].text == "Rice."


async def test_scores_are_kept_to_the_last_digit(tmp_path: Path) -> None:
    request = ScoreRequest([Message("user", "rice")], "Yes.")
    async with Cache(inner := ScriptedBackend(scores=lambda request: -1 / 3), tmp_path / "cache") as cache:
        assert await cache.score([request]) == await cache.score([request])
        assert (await cache.score([request]))[0].logprob == -1 / 3
        assert len(inner.scored) == 1


async def test_what_is_no_cache_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("years of work " * 1000)
    with pytest.raises(InputError, match=r"notes\.txt: cannot be used as a cache"):
        Cache(numbered(), file)
    assert file.read_text() == "years of work " * 1000
    with pytest.raises(InputError, match="cannot be used"):
        Cache(numbered(), tmp_path)


async def test_an_answer_is_on_disk_when_it_is_given(tmp_path: Path) -> None:
    async with Cache(numbered(), tmp_path / "cache") as cache:
        await cache.chat([ask("rice")])
        with sqlite3.connect(tmp_path / "cache") as other:
            assert other.execute("SELECT count(*) FROM results").fetchone() == (1,)
