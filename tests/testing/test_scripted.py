"""The scripted backend: its script, its memory and its failures. What every backend promises is under contract."""

from __future__ import annotations

import pytest

from popi.backends.base import ChatRequest, ChatResult, ScoreRequest, ScoreResult
from popi.errors import BackendError
from popi.prompts import Message
from popi.testing import ScriptedBackend


def ask(text: str, **options: object) -> ChatRequest:
    return ChatRequest([Message("system", "be kind"), Message("user", text)], **options)


async def test_answers_come_from_a_mapping_by_the_last_message() -> None:
    backend = ScriptedBackend({"hello": "good day to you"})
    found, missing = await backend.chat([ask("hello"), ask("bye")])
    assert found == ChatResult("good day to you", "stop", 3, 4, "scripted")
    assert missing.finish_reason == "error" and "'bye'" in (missing.error or "")


async def test_answers_come_from_a_function_of_the_request() -> None:
    backend = ScriptedBackend(lambda request: f"{request.seed} {request.messages[0].content}")
    (result,) = await backend.chat([ask("hello", seed=4)])
    assert result.text == "4 be kind"


async def test_one_item_can_be_told_to_fail() -> None:
    failure = ChatResult("", "error", error="refused")
    backend = ScriptedBackend(
        lambda request: failure if request.messages[-1].content == "bad" else "fine",
        lambda request: ScoreResult(float("nan"), 0, error="refused"),
    )
    assert [result.error for result in await backend.chat([ask("good"), ask("bad")])] == [None, "refused"]
    (score,) = await backend.score([ScoreRequest([Message("user", "x")], "y")])
    assert score.error == "refused"
    with pytest.raises(BackendError, match="refused"):
        [piece async for piece in backend.stream(ask("bad"))]


async def test_the_whole_can_be_told_to_fail_and_to_come_back() -> None:
    backend = ScriptedBackend()
    backend.dead = "switched off"
    with pytest.raises(BackendError, match="switched off"):
        await backend.chat([])
    backend.dead = None
    assert await backend.chat([]) == []


async def test_it_remembers_what_it_was_asked() -> None:
    backend = ScriptedBackend()
    rating = ScoreRequest([Message("user", "x")], "y")
    await backend.chat([ask("one"), ask("two")])
    pieces = [piece async for piece in backend.stream(ask("three"))]
    await backend.score([rating])
    assert backend.chats == [ask("one"), ask("two"), ask("three")]
    assert backend.scored == [rating]
    assert pieces == ["Noted:", " three"]


async def test_scores_come_from_a_function_or_are_a_nat_a_token() -> None:
    rating = ScoreRequest([Message("user", "one two three")], "four words in it")
    (plain,) = await ScriptedBackend().score([rating])
    assert plain == ScoreResult(-5.0, 5, 3, "scripted")
    (told,) = await ScriptedBackend(scores=lambda request: -float(len(request.response))).score([rating])
    assert told == ScoreResult(-16.0, 5, 3, "scripted")
