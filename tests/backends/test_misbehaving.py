"""Servers whose responses differ from OpenAI's: what is a response, what is a failure, and what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from popi.backends.base import Backend, ChatRequest, ChatResult, ScoreRequest
from popi.backends.openai import OpenAIBackend
from popi.errors import BackendError
from popi.prompts import Message
from tests.faults import Scripted, ScriptedServer, Serve, piece, rendered
from tests.servers import SERVED

USAGE = {"prompt_tokens": 7, "completion_tokens": 6}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}
WORDS = "ha ", "ha ", "good"

Pieces = list[dict[str, Any]]


def ask(text: str = "How do I cook rice?", **options: Any) -> ChatRequest:
    return ChatRequest([Message("user", text)], **{"max_tokens": 256, **options})


@pytest.fixture(params=[None, SERVED], ids=["by messages", "by token ids"])
def tokenizer(request: pytest.FixtureRequest) -> str | None:
    return request.param


def backend(server: ScriptedServer, tokenizer: str | None = None, **options: Any) -> OpenAIBackend:
    context = {} if tokenizer is None else {"context_length": 1024}
    return OpenAIBackend("m", base_url=server.url, key=None, tokenizer=tokenizer, **{**context, **options})


async def streamed(backend: Backend, request: ChatRequest) -> tuple[list[str], ChatResult | BackendError]:
    """The pieces of a stream, and its result or error."""
    pieces, results = list[str](), list[ChatResult]()
    try:
        async for each in backend.stream(request, results.append):
            pieces.append(each)
    except BackendError as error:
        assert not results
        return pieces, error
    [result] = results
    return pieces, result


RESPONSES: dict[str, Pieces] = {
    "plain": [piece("ha "), piece("ha "), piece("good"), piece(reason="stop", usage=USAGE)],
    "the same usage in every piece": [*[piece(word, usage=USAGE) for word in WORDS], piece(reason="stop")],
    "empty usage in every piece": [*[piece(word, usage={}) for word in WORDS], piece(reason="stop")],
    "null usage": [piece("ha ha good", "stop", usage=None)],
    "usage of another form": [piece("ha ha ", usage=[]), piece("good", "stop", usage="unknown")],
    "an empty finish reason in every piece": [*[piece(word, "") for word in WORDS], piece(reason="stop")],
    "usage at the end": [piece("ha ha "), piece("good", "stop"), piece(choices=[], usage=USAGE)],
    "null choices at the end": [piece("ha ha "), piece("good", "stop"), piece(choices=None, usage=USAGE)],
    "no choices at the beginning": [piece(choices=[]), piece("ha ha good", "stop")],
    "a second response": [
        piece(choices=[{"index": 1, "text": "no", "delta": {"content": "no"}, "message": {"content": "no"}}]),
        piece("ha ha good", "stop"),
    ],
    "no finish reason": [piece("ha ha "), piece("good"), piece(choices=[], usage=USAGE)],
    "another finish reason": [piece("ha ha good", "eos_token")],
    "a block of reasoning": [piece("<thi"), piece("nk>why"), piece("?</think>\n\nha ha"), piece(" good", "stop")],
    "a block that the template opened": [piece("</think>"), piece("\n\nha ha good", "stop")],
    "a block in capitals": [piece("<THINK>why?</TH"), piece("INK>ha ha good", "stop")],
    "a block with other marks": [piece("\u25c1think\u25b7why?\u25c1/think\u25b7"), piece("ha ha good", "stop")],
    "an empty block": [piece("<think>\n\n</think>\n\nha ha good", "stop")],
}  # fmt: skip


@pytest.mark.parametrize("pieces", RESPONSES.values(), ids=RESPONSES)
async def test_a_response_is_complete_and_the_same_in_chat_and_stream(
    serve: Serve, tokenizer: str | None, pieces: Pieces
) -> None:
    server = serve(Scripted(pieces))
    async with backend(server, tokenizer) as served:
        [result] = await served.chat([ask()])
        shown, last = await streamed(served, ask())
    assert (result.text, result.finish_reason, result.error) == ("ha ha good", "stop", None)
    assert last == result and "".join(shown) == result.text


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        *[(word, "length") for word in ("length", "max_tokens", "MAX_TOKENS", "model_context_window_exceeded")],
        *[(word, "filtered") for word in ("content_filter", "content-filter", "SAFETY", "sensitive")],
        *[(word, "stop") for word in ("stop", "end_turn", "STOP", "eos")],
    ],
)
async def test_servers_have_many_words_for_the_end_of_a_response(
    serve: Serve, tokenizer: str | None, word: str, reason: str
) -> None:
    async with backend(serve(Scripted([piece("ha ha", word)])), tokenizer) as served:
        [result] = await served.chat([ask()])
        _, last = await streamed(served, ask())
    assert (result.text, result.finish_reason) == ("ha ha", reason)
    assert last == result if reason != "filtered" else isinstance(last, BackendError)


@pytest.mark.parametrize("word", ["error", "abort", "network_error", "timeout"])
async def test_a_response_that_the_server_stopped_is_a_failure(serve: Serve, tokenizer: str | None, word: str) -> None:
    async with backend(serve(Scripted([piece("ha ha", word)])), tokenizer) as served:
        [result] = await served.chat([ask()])
        _, last = await streamed(served, ask())
    assert (result.failure, result.error) == ("server", f"the server stopped the response ({word})")
    assert isinstance(last, BackendError) and last.failure == "server"


KEPT_ALIVE = {
    "empty events": b"data:\n\ndata: \n\n",
    "comments": b": waiting\n\n:\n\n",
    "other fields": b"event: ping\nid: 7\nretry: 100\n\n",
}
ENDS = {"[DONE] twice": b"data: [DONE]\n\ndata: [DONE]\n\n", "no space": b"data:[DONE]\n\n", "no [DONE]": b""}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("between", KEPT_ALIVE.values(), ids=KEPT_ALIVE)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=ascii)
async def test_a_stream_may_be_kept_alive_and_end_in_several_ways(
    serve: Serve, between: bytes, end: bytes, line_end: bytes
) -> None:
    events = [b"data: " + json.dumps(rendered(part, "delta")).encode() + b"\n\n" for part in RESPONSES["plain"]]
    body = (between + between.join([*events, end])).replace(b"\n", line_end)
    server = serve(Scripted(body, headers={"Content-Type": "text/event-stream"}))
    async with backend(server) as served:
        shown, last = await streamed(served, ask())
        assert [last] == await served.chat([ask()])
    assert isinstance(last, ChatResult) and (shown, last.text) == (["ha ", "ha ", "good"], "ha ha good")


OF_MESSAGES: dict[str, Pieces] = {
    "reasoning in a field": [piece(reasoning_content="why"), piece("ha ha good", "stop")],
    "reasoning in another field": [piece(reasoning="why"), piece("ha ha good", "stop")],
    "parts": [
        piece(
            [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, {"type": "text", "text": "ha ha "}]
        ),
        piece([{"type": "text", "text": "good"}], "stop"),
    ],
    "text with a call of a tool": [piece("ha ha good"), piece(reason="tool_calls", tool_calls=[TOOL_CALL])],
}


@pytest.mark.parametrize("pieces", OF_MESSAGES.values(), ids=OF_MESSAGES)
async def test_what_is_beside_the_text_of_a_message_is_no_part_of_it(serve: Serve, pieces: Pieces) -> None:
    async with backend(serve(Scripted(pieces))) as served:
        [result] = await served.chat([ask()])
        shown, last = await streamed(served, ask())
    assert (result.text, result.finish_reason, result.error) == ("ha ha good", "stop", None)
    assert last == result and "".join(shown) == result.text


CUT = {"prompt_tokens": 300, "completion_tokens": 256}
ALL_REASONING = "reasoning used all 256 tokens; raise max_tokens"
EMPTY: dict[str, tuple[Pieces, str]] = {
    "nothing": ([piece("", "stop")], "the model wrote no text"),
    "null": ([piece(None, "stop")], "the model wrote no text"),
    "white space": ([piece(" \n"), piece("\n", "stop")], "the model wrote no text"),
    "nothing, cut off": ([piece("", "length", usage=CUT)], "all 256 tokens were used without writing text"),
    "reasoning that was cut off": ([piece("<think>so I "), piece("will", "length", usage=CUT)], ALL_REASONING),
    "reasoning without an end": ([piece("<think>so I will", "stop")], "the model wrote reasoning and no response"),
    "reasoning alone": ([piece("<think>so</think>\n\n", "stop")], "the model wrote no text"),
}
EMPTY_MESSAGES: dict[str, tuple[Pieces, str]] = {
    "reasoning in a field took all": ([piece("", "length", usage=CUT, reasoning_content="so")], ALL_REASONING),
    "reasoning in another field took all": ([piece(None, "length", usage=CUT, reasoning="so")], ALL_REASONING),
    "reasoning that is only counted took all": (
        [piece("", "length", usage={**CUT, "completion_tokens_details": {"reasoning_tokens": 256}})],
        ALL_REASONING,
    ),
    "reasoning in parts took all": ([piece([THOUGHT], "length", usage=CUT)], ALL_REASONING),
    "calls of tools": ([piece(None, "tool_calls", tool_calls=[TOOL_CALL])], "the model called tools instead of"),
    "a call of a function": ([piece(None, "stop", function_call={"name": "f"})], "the model called tools instead of"),
    "no parts": ([piece([], "stop")], "the model wrote no text"),
}  # fmt: skip


async def assert_empty(served: Backend, why: str) -> None:
    [result] = await served.chat([ask()])
    assert (result.text, result.finish_reason, result.failure) == ("", "error", "empty")
    assert str(result.error).startswith("the response is empty: ") and why in str(result.error)
    shown, error = await streamed(served, ask())
    assert isinstance(error, BackendError) and not "".join(shown).strip()
    assert (error.failure, str(error)) == ("empty", f"m: {result.error}")


@pytest.mark.parametrize(("pieces", "why"), EMPTY.values(), ids=EMPTY)
async def test_a_response_without_text_is_a_failure_that_says_why(
    serve: Serve, tokenizer: str | None, pieces: Pieces, why: str
) -> None:
    async with backend(serve(Scripted(pieces)), tokenizer) as served:
        await assert_empty(served, why)


@pytest.mark.parametrize(("pieces", "why"), EMPTY_MESSAGES.values(), ids=EMPTY_MESSAGES)
async def test_a_message_without_text_is_a_failure_that_says_why(serve: Serve, pieces: Pieces, why: str) -> None:
    async with backend(serve(Scripted(pieces))) as served:
        await assert_empty(served, why)


async def test_the_tokens_of_an_empty_response_are_reported(serve: Serve) -> None:
    async with backend(serve(Scripted([piece("", "length", usage=CUT)]))) as served:
        [result] = await served.chat([ask()])
    assert (result.prompt_tokens, result.completion_tokens) == (300, 256)


async def test_a_block_that_ends_after_its_text_was_shown_spoils_the_stream_alone(
    serve: Serve, tokenizer: str | None
) -> None:
    server = serve(Scripted([piece("so I will"), piece("</think>good", "stop")]))
    async with backend(server, tokenizer) as served:
        [result] = await served.chat([ask()])
        shown, error = await streamed(served, ask())
    assert (result.text, result.error) == ("good", None)
    assert shown[0] == "so I will" and isinstance(error, BackendError) and error.failure == "malformed"
    assert "turn on the reasoning parser of the server" in str(error)


INCOMPLETE: dict[str, Scripted] = {
    "without an end": Scripted([piece("ha "), piece("ha ")], done=False),
    "without an end, with usage": Scripted([piece("ha ", usage=USAGE), piece("ha ", usage=USAGE)], done=False),
    "in the middle of an event": Scripted([piece("ha "), piece("ha "), piece(raw='{"choices": [{"del')], done=False),
}


@pytest.mark.parametrize("reply", INCOMPLETE.values(), ids=INCOMPLETE)
async def test_a_stream_that_breaks_off_is_malformed(serve: Serve, tokenizer: str | None, reply: Scripted) -> None:
    async with backend(serve(reply), tokenizer) as served:
        shown, error = await streamed(served, ask())
    assert shown == ["ha ", "ha "] and isinstance(error, BackendError) and error.failure == "malformed"


@pytest.mark.parametrize("last", [piece(reason="stop"), piece(choices=[], usage=USAGE)], ids=["reason", "usage"])
async def test_a_reason_or_the_usage_at_the_end_is_an_end(serve: Serve, last: dict[str, Any]) -> None:
    async with backend(serve(Scripted([piece("ha "), last], done=False))) as served:
        assert (await streamed(served, ask()))[0] == ["ha "]


async def test_a_server_may_stream_what_is_not_asked_as_a_stream_and_the_other_way_round(
    serve: Serve, tokenizer: str | None
) -> None:
    for streams in (True, False):
        server = serve(Scripted([piece("ha "), piece("ha", "stop", usage=USAGE)], streams=streams))
        async with backend(server, tokenizer) as served:
            [result] = await served.chat([ask()])
            shown, last = await streamed(served, ask())
        assert (result.text, "".join(shown), last) == ("ha ha", "ha ha", result)


HEADS = {
    "nothing": b"",
    "BOM": b"\xef\xbb\xbf",
    "white space": b" ",
    "a comment": b": ping\n\n",
    "retry": b"retry: 9\n\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=ascii)
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_a_stream_is_read_whatever_it_begins_with_and_is_labelled(
    serve: Serve, head: bytes, end: bytes, kind: str
) -> None:
    events = [
        b'data: {"choices": [{"delta": {"content": "ha "}}]}',
        b'data: {"choices": [{"delta":%sdata: {"content": "ha"}}]}' % end,
    ]
    body = head + (end * 2).join([*events, b"event: ping", b"data: [DONE]"])
    async with backend(serve(Scripted(body, headers={"Content-Type": kind}))) as served:
        [result] = await served.chat([ask()])
        assert (await streamed(served, ask()))[1] == result
    assert result.text == "ha ha"


HALVES = {
    "\ud83d short": "\ufffd short",
    "a\x07b\x00c": "a\x07b\x00c",
    "one\u2028two\x85three": "one\u2028two\x85three",
}


@pytest.mark.parametrize("text", HALVES, ids=ascii)
async def test_every_text_can_be_written(serve: Serve, tokenizer: str | None, text: str) -> None:
    async with backend(serve(Scripted([piece("so "), piece(text), piece(".", "stop")])), tokenizer) as served:
        [result] = await served.chat([ask()])
        shown, last = await streamed(served, ask())
    assert result.text == f"so {HALVES[text]}." and result.text.encode()
    assert last == result and "".join(shown) == result.text and all(each.encode() for each in shown)


async def test_a_character_may_come_in_two_pieces(serve: Serve) -> None:
    async with backend(serve(Scripted([piece("so \ud83d"), piece("\ude00."), piece(reason="stop")]))) as served:
        shown, _ = await streamed(served, ask())
    assert shown == ["so ", "😀."]


BAD_BODIES: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "a number of 10,000 digits": b'{"choices": [], "created": ' + b"1" * 10_000 + b"}",
    "half a JSON": b'{"choices": [{"message": {"cont',
    "no JSON": b"<html>hello</html>",
    "nothing": b"",
    "a list": b"[1, 2]",
    "no choices": b'{"choices": []}',
    "a choice without a message": b'{"choices": [{"finish_reason": "stop"}]}',
    "strings in place of parts": b'{"choices": [{"message": {"content": ["Ri", "ce"]}}]}',
    "negative usage": b'{"choices": [{"message": {"content": "Rice."}}], "usage": {"prompt_tokens": -1}}',
}


@pytest.mark.parametrize("bad", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_one_malformed_response_spoils_no_other(serve: Serve, bad: bytes) -> None:
    def script(body: dict[str, Any]) -> Scripted:
        return Scripted(bad) if body["messages"][0]["content"] == "bad" else Scripted([piece("fine", "stop")])

    async with backend(serve(script)) as served:
        one, odd, two = await served.chat([ask("good"), ask("bad"), ask("good")])
        shown, error = await streamed(served, ask("bad"))
    assert (one.text, two.text) == ("fine", "fine")
    assert odd.failure == "malformed" and "malformed response: " in str(odd.error) and "\n" not in str(odd.error)
    assert not shown and isinstance(error, BackendError) and error.failure == "malformed"


async def test_bytes_that_are_not_utf8_are_replaced(serve: Serve) -> None:
    body = b'{"choices": [{"finish_reason": "stop", "message": {"content": "so \xff\xfe."}}]}'
    async with backend(serve(Scripted(body))) as served:
        [result] = await served.chat([ask()])
    assert result.text == "so \ufffd\ufffd."


ERRORS: dict[str, tuple[int, Any, str, str]] = {
    "a code": (200, {"error": {"code": 401, "message": "no credits left"}}, "denied", "error 401: no credits left"),
    "a code as text": (200, {"error": {"code": "429", "message": "slow down"}}, "rate_limit", "error 429: slow down"),
    "a server's code": (200, {"error": {"code": 502, "message": "upstream"}}, "server", "error 502: upstream"),
    "a name": (200, {"error": {"code": "rate_limit_exceeded", "message": "slow down"}}, "rate_limit", "slow down"),
    "a type": (200, {"error": {"type": "invalid_request_error", "message": "no"}}, "request", "no"),
    "no code": (200, {"error": {"message": "something broke"}}, "server", "something broke"),
    "a text": (200, {"error": "something broke"}, "server", "something broke"),
    "no message": (200, {"error": {"code": 503, "why": "x"}}, "server", "error 503: no message, only {'code': 503, "),
    "an error without its frame": (200, {"object": "error", "message": "no", "code": 400}, "request", "error 400: no"),
    "a detail": (200, {"detail": "something broke"}, "server", "something broke"),
    "in a choice": (
        200,
        {"choices": [{"finish_reason": "error", "error": {"code": 429, "message": "slow down"}, "message": {}}]},
        "rate_limit",
        "error 429: slow down",
    ),
    "a status": (500, {"error": {"message": "overloaded"}}, "server", "HTTP 500: overloaded"),
    "a status with a detail": (422, {"detail": "no such thing"}, "request", "HTTP 422: no such thing"),
    "a status with details": (
        422,
        {"object": "error", "detail": [{"loc": ["body", "messages"], "msg": "Field required"}]},
        "request",
        "HTTP 422: messages: Field required",
    ),
    "a status with errors": (400, {"errors": [{"message": "a"}, {"message": "b"}]}, "request", "HTTP 400: a; b"),
    "a status with a text": (400, b"no such thing", "request", "HTTP 400: no such thing"),
    "a status with a page": (503, b"<html><body>oops</body></html>", "server", "HTTP 503: Service Unavailable"),
    "a status alone": (500, b"", "server", "HTTP 500: Internal Server Error"),
    "no credit": (402, {"error": {"message": "no credits left"}}, "denied", "HTTP 402: no credits left"),
    "no quota": (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, "denied", "HTTP 429: pay"),
}  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind", "says"), ERRORS.values(), ids=ERRORS)
async def test_the_servers_own_message_is_shown_and_decides_the_kind(
    serve: Serve, tokenizer: str | None, status: int, body: Any, kind: str, says: str
) -> None:
    async with backend(serve(Scripted(body, status=status)), tokenizer) as served:
        try:
            [result] = await served.chat([ask()])
            assert kind != "denied" and result.failure == kind and str(result.error).startswith(says)
        except BackendError as error:
            assert kind == "denied" and error.failure == kind and str(error).startswith(f"m: {says}")
        shown, last = await streamed(served, ask())
        assert isinstance(last, BackendError) and (shown, last.failure) == ([], kind)
        assert str(last).startswith(f"m: {says}")


UNKNOWN_ERRORS = [
    {"base_resp": {"status_code": 1004, "status_msg": "the key is not valid"}},
    {"choices": None, "error_code": 18, "error_msg": "the key is not valid"},
    {"fault": {"faultstring": "the key is not valid"}},
]


@pytest.mark.parametrize("body", UNKNOWN_ERRORS, ids=lambda body: next(reversed(body)))
async def test_an_error_of_unknown_form_is_shown_as_it_is(
    serve: Serve, tokenizer: str | None, body: dict[str, Any]
) -> None:
    async with backend(serve(Scripted(body)), tokenizer) as served:
        [result] = await served.chat([ask()])
        _, last = await streamed(served, ask())
    assert result.failure == "malformed" and "the key is not valid" in str(result.error)
    assert isinstance(last, BackendError) and "the key is not valid" in str(last)


async def test_an_error_of_unknown_form_shows_no_secret(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret-123")
    server = serve(Scripted({"fault": "sk-secret-123 is not known"}))
    async with OpenAIBackend("m", base_url=server.url, key="SOME_KEY") as served:
        [result] = await served.chat([ask()])
    assert "is not known" in str(result.error) and "secret" not in str(result.error)


async def test_events_of_other_kinds_are_left_out(serve: Serve, tokenizer: str | None) -> None:
    others = [piece(raw='{"type": "ping"}'), piece(raw='{"usage": {"prompt_tokens": 3}}'), piece(raw="{}")]
    server = serve(Scripted([piece("ha "), *others, piece("ha", "stop")], streams=True))
    async with backend(server, tokenizer) as served:
        shown, last = await streamed(served, ask())
        assert (shown, await served.chat([ask()])) == (["ha ", "ha"], [last])


async def test_an_error_in_a_stream_is_the_servers_own(serve: Serve, tokenizer: str | None) -> None:
    error = json.dumps({"error": {"code": 503, "message": "the GPU is lost"}})
    async with backend(serve(Scripted([piece("ha "), piece(raw=error)])), tokenizer) as served:
        shown, last = await streamed(served, ask())
    assert shown == ["ha "] and isinstance(last, BackendError)
    assert (last.failure, str(last)) == ("server", "m: error 503: the GPU is lost")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "Infinity", "1e999"])
async def test_a_log_probability_that_is_not_finite_is_a_failed_item(serve: Serve, value: str) -> None:
    def script(body: dict[str, Any]) -> Scripted:
        values = ["null", *["-1.0"] * (len(body["prompt"]) - 1)]
        if len(body["prompt"]) == bad:
            values[-2] = value
        logprobs = f'{{"token_logprobs": [{", ".join(values)}]}}'
        return Scripted(f'{{"choices": [{{"text": "", "logprobs": {logprobs}}}]}}'.encode())

    async with backend(serve(script), SERVED) as served:
        requests = [ScoreRequest([Message("user", "hello")], text) for text in ("yes it is", "no")]
        bad = -1
        one, two = await served.score(requests)
        assert one.error is None and two.error is None
        bad = one.prompt_tokens + one.tokens
        odd, fine = await served.score(requests)
    assert odd.failure == "malformed" and "the log-probability is not finite" in str(odd.error)
    assert fine == two
