"""Responses to one prompt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from popi.backends.base import ChatRequest, ChatResult, FailureKind, FinishReason
from popi.errors import BackendError
from popi.personalizer import Personalizer
from popi.response import Response
from popi.roles import Failure
from popi.testing import ScriptedBackend

from .conftest import SHORT, collect, personalizer_on, script, wants_summary


def result(text: str, reason: FinishReason, error: str | None = None, kind: FailureKind | None = None) -> ChatResult:
    return ChatResult(text, reason, 10, 5, "m", error, kind, route="r")


class TestResponses:
    async def test_an_item_that_fails_names_the_user(self, personalizer: Personalizer) -> None:
        with pytest.raises(BackendError, match=r"^no response for user 'ann': cannot$") as caught:
            await personalizer.respond("ann", "fail")
        assert caught.value.failure == "request"
        with pytest.raises(BackendError, match=r"^no response: cannot$"):
            await personalizer.respond(None, "fail")

    @pytest.mark.parametrize(
        ("answer", "says", "kind"),
        [
            ("", "the response is empty: the model wrote no text", "empty"),
            (" \n", "the response is empty", "empty"),
            ("<think>hmm", "the model wrote reasoning and no response", "empty"),
            (result("", "stop"), "the response is empty", "empty"),
            (result(" \n ", "length"), "the response is empty", "empty"),
            (result("", "refused", "the model refused: I cannot"), "the model refused: I cannot", "empty"),
            (result("", "filtered", "a filter removed it"), "a filter removed it", "empty"),
            (result("half", "error", "broke off", "unreachable"), "broke off", "unreachable"),
        ],
    )
    async def test_what_is_no_response_is_never_returned(
        self, answer: str | ChatResult, says: str, kind: FailureKind
    ) -> None:
        personalizer = personalizer_on(ScriptedBackend(lambda request: answer))
        for respond in (personalizer.respond("ann", "How?"), collect(personalizer.stream("ann", "How?"))):
            with pytest.raises(BackendError, match=says):
                await respond
        [(_, outcome)] = await collect(personalizer.respond_many([("ann", "How?")]))
        assert isinstance(outcome, Failure)
        assert (outcome.user_id, outcome.failure) == ("ann", kind)
        assert says in outcome.error

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            (result("one two", "length"), "it was truncated after 5 tokens; raise max_tokens"),
            (result("I cannot.", "refused", "the model refused: I cannot."), "the model refused"),
            (result("one two", "filtered", "a filter"), "a content filter removed a part of it"),
        ],
    )
    async def test_an_incomplete_response_is_an_error_where_it_must_be_complete(
        self, answer: ChatResult, says: str
    ) -> None:
        personalizer = personalizer_on(ScriptedBackend(lambda request: answer))
        assert await personalizer.respond("ann", "How?") == Response(answer.text, answer.finish_reason, 10, 5, "m", "r")
        with pytest.raises(BackendError, match=f"the response for user 'ann' is incomplete: {says}"):
            await personalizer.respond("ann", "How?", require_complete=True)
        with pytest.raises(BackendError, match="is incomplete"):
            personalizer.respond_sync("ann", "How?", require_complete=True)

    async def test_a_truncated_stream_is_an_error_after_its_last_piece_where_it_must_be_complete(self) -> None:
        personalizer = personalizer_on(ScriptedBackend(lambda request: result("one two", "length")))
        responses, pieces = list[Response](), list[str]()
        assert await collect(personalizer.stream("ann", "How?", responses.append)) == ["one", " two"]
        assert [response.finish_reason for response in responses] == ["length"]
        with pytest.raises(BackendError, match="raise max_tokens"):
            async for piece in personalizer.stream("ann", "How?", responses.append, require_complete=True):
                pieces.append(piece)
        assert (pieces, len(responses)) == (["one", " two"], 1)

    async def test_a_stream_ends_with_the_whole_response(self, personalizer: Personalizer) -> None:
        personalizer.observe("ann", SHORT)
        whole = list[Response]()
        threads = set[int]()

        def on_complete(response: Response) -> None:
            whole.append(response)
            threads.add(threading.get_ident())

        pieces = await collect(personalizer.stream("ann", "How?", on_complete))
        assert "".join(pieces) == whole[0].text == "Answered under - Said 1 things"
        assert whole == [await personalizer.respond("ann", "How?")]
        assert threads == {threading.get_ident()}

    @pytest.mark.parametrize("leave", ["close", "cancel"])
    async def test_a_stream_that_is_left_is_closed_down_to_the_backend(self, leave: str) -> None:
        class Slow(ScriptedBackend):
            async def stream(self, request: ChatRequest, *args: Any) -> AsyncIterator[str]:
                self.streams += 1
                try:
                    yield "one"
                    await asyncio.sleep(60)
                finally:
                    await asyncio.sleep(0.01)
                    self.streams -= 1

        backend = Slow(script)
        pieces = personalizer_on(backend).stream("ann", "How?")
        assert await anext(pieces) == "one"
        assert backend.streams == 1
        if leave == "close":
            await pieces.aclose()
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(pieces)
        assert backend.streams == 0

    async def test_a_stream_without_a_result_is_an_error(self) -> None:
        class Silent(ScriptedBackend):
            async def stream(self, request: ChatRequest, *args: Any) -> AsyncIterator[str]:
                yield "one"

        with pytest.raises(BackendError, match="the stream ended without a result"):
            await collect(personalizer_on(Silent(script)).stream(None, "How?"))

    async def test_responds_to_a_plain_prompt_and_under_a_given_summary(
        self, personalizer: Personalizer, backend: ScriptedBackend
    ) -> None:
        personalizer.observe("ann", SHORT)
        given = personalizer_on(backend).edit("bob", "- given").interface
        assert str(await personalizer.respond(None, "How?")) == "Answered under"
        assert str(await personalizer.respond("ann", "How?", interface=given)) == "Answered under - given"
        assert await collect(personalizer.stream(None, "How?", interface=given)) == [
            "Answered",
            " under",
            " -",
            " given",
        ]
        assert not any(map(wants_summary, backend.chats))
