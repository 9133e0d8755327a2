"""A backend for servers that speak OpenAI's protocol: a real one, and what the failures of others become."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate

import pytest

from popi.backends.base import TRANSIENT, ChatRequest, ChatResult, ScoreRequest
from popi.backends.openai import OpenAIBackend
from popi.backends.remote.failures import failed
from popi.errors import BackendError, ConfigError
from popi.prompts import Message
from tests.faults import Scripted, Serve, piece
from tests.servers import KEY, SERVED


def ask(text: str = "How do I cook rice?", **options: object) -> ChatRequest:
    return ChatRequest([Message("user", text)], **{"max_tokens": 12, **options})


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")


def backend(url: str, **options: object) -> OpenAIBackend:
    return OpenAIBackend(SERVED, base_url=url, key=KEY, **options)


@pytest.mark.slow
async def test_a_black_box_answers_as_the_open_model_does(vllm_url: str) -> None:
    requests = [ask(), ask("如何煮米饭"), ask(stop=("e",)), ask(temperature=1.0, seed=7)]
    async with backend(vllm_url) as box, backend(vllm_url, tokenizer=SERVED) as known:
        told, expected = await box.chat(requests), await known.chat(requests)
        assert [result.text for result in told] == [result.text for result in expected]
        assert [result.finish_reason for result in told] == [result.finish_reason for result in expected]
        assert [result.prompt_tokens for result in told] == [result.prompt_tokens for result in expected]
        whole = list[ChatResult]()
        pieces = [piece async for piece in box.stream(ask(), whole.append)]
        assert len(pieces) > 1 and "".join(pieces) == told[0].text
        assert whole == told[:1]


@pytest.mark.slow
async def test_greedy_texts_and_scores_are_those_of_transformers(vllm_url: str) -> None:
    from popi.backends.transformers import TransformersBackend
    from popi.data.miniworld import generate
    from popi.prompts import DEFAULT

    made = [(example, pair) for example in generate(split="validation", users=8, seed=0) for pair in example.tests]
    told = [DEFAULT.answer_messages(pair.prompt, example.oracles["truth"]) for example, pair in made]
    chats = [ChatRequest(messages, max_tokens=40) for messages in told]
    scores = [ScoreRequest(messages, pair.chosen) for messages, (_, pair) in zip(told, made, strict=True)]
    async with backend(vllm_url, tokenizer=SERVED) as known, TransformersBackend(SERVED) as local:
        assert await known.chat(chats) == await local.chat(chats)
        for served, expected in zip(await known.score(scores), await local.score(scores), strict=True):
            assert (served.tokens, served.prompt_tokens) == (expected.tokens, expected.prompt_tokens)
            assert abs(served.logprob - expected.logprob) < 1e-3 * expected.tokens


@pytest.mark.slow
async def test_a_black_box_gives_no_scores_and_says_how_to_have_them(vllm_url: str) -> None:
    async with backend(vllm_url) as box:
        assert not box.capabilities.score
        with pytest.raises(BackendError, match="set the option tokenizer"):
            await box.score([ScoreRequest([Message("user", "hello")], "yes")])


@pytest.mark.slow
async def test_what_a_server_refuses_is_an_error_in_its_result(vllm_url: str) -> None:
    async with backend(vllm_url) as box:
        long, fine = await box.chat([ask("what " * 600), ask()])
        assert long.failure == "request" and "512" in str(long.error) and fine.error is None
        with pytest.raises(BackendError, match="400"):
            [piece async for piece in box.stream(ask("what " * 600))]


@pytest.mark.slow
async def test_a_wrong_key_and_an_unknown_model_concern_every_request(
    vllm_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "guessed")
    unknown = OpenAIBackend("nobody", base_url=vllm_url, key=KEY)
    stranger = OpenAIBackend(SERVED, base_url=vllm_url, key="OTHER_KEY")
    for refused, says in ((unknown, "404.*nobody"), (stranger, "401")):
        async with refused:
            with pytest.raises(BackendError, match=says) as caught:
                await refused.chat([ask(), ask()])
            assert caught.value.failure == "denied"


@pytest.mark.slow
async def test_a_thousand_requests_at_once_are_all_answered(vllm_url: str) -> None:
    async with backend(vllm_url, tokenizer=SERVED, max_concurrency=32) as known:
        answers = await asyncio.gather(*(known.chat([ask(f"What is {n}?", max_tokens=2)]) for n in range(1000)))
        assert all(result.error is None for [result] in answers)


@pytest.mark.slow
async def test_one_backend_serves_one_event_loop_after_the_other(vllm_url: str) -> None:
    known = backend(vllm_url, tokenizer=SERVED)

    def elsewhere() -> str:
        return asyncio.run(known.chat([ask()]))[0].text

    first = (await known.chat([ask()]))[0].text
    assert await asyncio.to_thread(elsewhere) == first == (await known.chat([ask()]))[0].text
    await known.close()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server on loopback."""
    async with await asyncio.start_server(handler, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@asynccontextmanager
async def answering(reply: bytes | None) -> AsyncIterator[str]:
    """A server that sends the same to every client and closes the connection; with ``None`` it sends nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if reply is None:
            await reader.read()
        else:
            writer.write(reply)
        writer.close()

    async with serving(serve) as url:
        yield url


def http(status: str, body: str = "", **headers: str) -> bytes:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body.encode())), **given}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n{body}".encode()


def completion(**message: object) -> str:
    reason = message.pop("finish_reason", "stop")
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": "Rice.", **message}}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


REJECTED = json.dumps({"error": {"message": "not now, please"}})

FAILURES = [
    (http("429 Too Many Requests", REJECTED, Retry_After="3"), "rate_limit", 3.0, "HTTP 429: not now, please"),
    (http("429 Too Many Requests", REJECTED, Retry_After_Ms="250"), "rate_limit", 0.25, "not now"),
    (http("429 Too Many Requests", REJECTED), "rate_limit", None, "not now"),
    (http("429 Too Many Requests", REJECTED, Retry_After="inf"), "rate_limit", None, "not now"),
    (http("429 Too Many Requests", REJECTED, Retry_After="soon"), "rate_limit", None, "not now"),
    (http("503 Service Unavailable", REJECTED, Retry_After="7"), "server", 7.0, "HTTP 503: not now, please"),
    (http("408 Request Timeout", REJECTED), "timeout", None, "HTTP 408"),
    (http("200 OK", completion(finish_reason="abort")), "server", None, "the server stopped the response (abort)"),
    (http("200 OK", completion(), Content_Encoding="gzip"), "malformed", None, "malformed response"),
    (None, "timeout", None, "no response within 0.3 s"),
]


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(("reply", "kind", "later", "says"), FAILURES)
async def test_a_failure_is_data_of_a_kind(reply: bytes | None, kind: str, later: float | None, says: str) -> None:
    async with answering(reply) as url, backend(url, timeout=0.3 if reply is None else 5) as box:
        [result] = await box.chat([ask()])
        assert (result.text, result.finish_reason, result.failure) == ("", "error", kind)
        assert result.retry_after == later
        assert says in str(result.error) and "\n" not in str(result.error)
        with pytest.raises(BackendError) as caught:
            [piece async for piece in box.stream(ask())]
        assert (caught.value.failure, caught.value.retry_after) == (kind, later)


@pytest.mark.usefixtures("key")
async def test_a_date_may_say_when_to_come_again() -> None:
    later = formatdate(time.time() + 30, usegmt=True)
    async with answering(http("429 Too Many Requests", REJECTED, Retry_After=later)) as url, backend(url) as box:
        [result] = await box.chat([ask()])
        assert result.retry_after == pytest.approx(30, abs=5)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("reply", [b"", http("200 OK", completion(), Content_Length="9999")], ids=["reset", "half"])
async def test_broken_connections_are_a_dead_backend_when_all_of_them_are(reply: bytes) -> None:
    async with answering(reply) as url, backend(url) as box:
        with pytest.raises(BackendError, match=f"connection to {url} failed: ") as caught:
            await box.chat([ask(), ask()])
        assert caught.value.failure == "unreachable" and caught.value.failure in TRANSIENT


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("message", "reason", "text", "error"),
    [
        ({}, "stop", "Rice.", None),
        ({"finish_reason": "length"}, "length", "Rice.", None),
        ({"content": None, "refusal": "I would rather not."}, "refused", "", "the model refused: I would rather not."),
        (
            {"content": [{"type": "refusal", "refusal": "I would rather not."}]},
            "refused",
            "",
            "the model refused: I would rather not.",
        ),
        ({"content": "Ri", "finish_reason": "content_filter"}, "filtered", "Ri", "the content filter of the server"),
        ({"content": None, "finish_reason": "content_filter"}, "filtered", "", "the content filter of the server"),
    ],
    ids=str,
)
async def test_how_a_response_ended_is_data(message: dict, reason: str, text: str, error: str | None) -> None:
    async with answering(http("200 OK", completion(**message))) as url, backend(url) as box:
        [result] = await box.chat([ask()])
        assert (result.finish_reason, result.text, result.failure) == (reason, text, None)
        assert (result.error or "").startswith(error or "") and (result.error is None) == (error is None)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({}, (0, 0)),
        ({"prompt_tokens": 7}, (7, 0)),
        ({"prompt_tokens": 7, "completion_tokens": None}, (7, 0)),
        (None, (0, 0)),
    ],
)
async def test_a_server_may_count_no_tokens(usage: dict | None, counted: tuple[int, int]) -> None:
    body = json.dumps({**json.loads(completion()), "usage": usage})
    async with answering(http("200 OK", body)) as url, backend(url) as box:
        [result] = await box.chat([ask()])
        assert (result.text, result.prompt_tokens, result.completion_tokens) == ("Rice.", *counted)


def test_an_error_of_tls_inside_a_body_is_a_broken_connection() -> None:
    error = ssl.SSLError(1, "decryption failed or bad record mac")
    failure = failed(error, url="https://popi.example/v1", timeout=1, redact=str)
    assert failure.kind == "unreachable" and "https://popi.example/v1 failed: " in failure.error


def streamed(*deltas: str, end: str = "stop", **more: str) -> bytes:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    choices = [{"index": 0, "delta": {"content": delta, **more}, "finish_reason": None} for delta in deltas]
    choices += [{"index": 0, "delta": {}, "finish_reason": end}]
    lines = [f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n" for choice in choices]
    return http("200 OK", "".join([*lines, "data: [DONE]\n\n"]), Content_Type="text/event-stream")


@pytest.mark.usefixtures("key")
async def test_a_stream_ends_with_its_last_event_although_the_connection_stays() -> None:
    async def serve_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = streamed("Ri", "ce")
        head, _, events = body.partition(b"\r\n\r\n")
        writer.write(re.sub(rb"\r\nContent-Length: \d+", b"", head) + b"\r\n\r\n" + events)
        await reader.read()
        writer.close()

    async with serving(serve_on) as url, backend(url, timeout=30) as box:
        async with asyncio.timeout(5):
            assert [piece async for piece in box.stream(ask())] == ["Ri", "ce"]
            assert (await box.chat([ask()]))[0].text == "Rice"


@pytest.mark.usefixtures("key")
async def test_connections_are_used_again(serve: Serve) -> None:
    ports = set[int]()

    async def serve_again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ports.add(writer.get_extra_info("peername")[1])
        with suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"content-length: (\d+)", head.lower())
                body = await reader.readexactly(int(length[1])) if length else b""
                writer.write(streamed("Rice") if b'"stream": true' in body else http("200 OK", completion()))
        writer.close()

    async with serving(serve_again) as url, backend(url) as box:
        for _ in range(3):
            assert (await box.chat([ask()]))[0].text == "Rice."
            assert [piece async for piece in box.stream(ask())] == ["Rice"]
    assert len(ports) == 1


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("reply", "says", "kind"),
    [
        (streamed("Ri", "ce")[:-60], "connection to .* failed", "unreachable"),
        (streamed("Ri", "ce", end="error"), r"the server stopped the response \(error\)", "server"),
        (streamed("Ri", "ce", end="content_filter"), "the content filter of the server", "withheld"),
        (streamed("Ri", "ce", refusal="No. "), "the model refused: No. No.", "withheld"),
    ],
    ids=["reset", "error", "filtered", "refused"],
)
async def test_a_stream_that_breaks_off_says_so_after_its_pieces(reply: bytes, says: str, kind: str) -> None:
    async with answering(reply) as url, backend(url) as box:
        pieces = []
        with pytest.raises(BackendError, match=says) as caught:
            async for piece in box.stream(ask()):
                pieces.append(piece)
        assert pieces == ["Ri", "ce"] and caught.value.failure == kind


@pytest.mark.usefixtures("key")
async def test_each_piece_of_a_stream_has_its_own_time(serve: Serve) -> None:
    """Reasoning that is not shown keeps a stream alive, and silence ends it."""

    async def serve_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for delta in [{"reasoning": "so"}] * 6 + [{"content": "Rice."}]:
            writer.write(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode())
            await writer.drain()
            await asyncio.sleep(0.1)
        await reader.read()
        writer.close()

    async with serving(serve_slowly) as url, backend(url, timeout=0.4) as box:
        stream = box.stream(ask())
        assert await anext(stream) == "Rice."
        with pytest.raises(BackendError, match=r"no response within 0\.4 s"):
            await anext(stream)


@pytest.mark.usefixtures("key")
async def test_a_server_that_echoes_no_log_probabilities_is_told_apart() -> None:
    score = ScoreRequest([Message("user", "hello")], "yes")
    silent = json.dumps({"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [{"text": ""}]})
    async with answering(http("200 OK", silent)) as url, backend(url, tokenizer=SERVED) as known:
        with pytest.raises(BackendError, match="set the option scores: false") as caught:
            await known.score([score] * 3)
        assert caught.value.failure == "denied"
        async with backend(url, tokenizer=SERVED, scores=False) as box:
            assert not box.capabilities.score
            with pytest.raises(BackendError, match="scoring is turned off by the option scores"):
                await box.score([score])


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("nan")}, {"max_concurrency": 0}])
def test_numbers_that_are_not_positive_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"field {next(iter(options))}: must be positive, got"):
        OpenAIBackend("m", key=None, **options)


@pytest.mark.usefixtures("key")
async def test_a_response_prefix_needs_the_tokenizer(serve: Serve) -> None:
    server = serve(Scripted([piece(" boil it", "length", usage={"prompt_tokens": 9, "completion_tokens": 2})]))
    request = ask(response_prefix="First,", max_tokens=2)
    async with backend(server.url) as box, backend(server.url, tokenizer=SERVED) as known:
        assert (box.capabilities.response_prefix, known.capabilities.response_prefix) == (False, True)
        [refused] = await box.chat([request])
        assert refused.failure == "request" and "set the option tokenizer" in str(refused.error)
        with pytest.raises(BackendError, match="set the option tokenizer"):
            await anext(box.stream(request))
        assert not server.bodies
        [plain], [result] = await known.chat([ask(max_tokens=2)]), await known.chat([request])
        assert (plain.text, result.text, result.completion_tokens) == (" boil it", "First, boil it", 2)
        whole = list[ChatResult]()
        assert "".join([each async for each in known.stream(request, whole.append)]) == result.text
        assert whole == [result]
        assert result.prompt_tokens == plain.prompt_tokens + known.count_tokens("First,")
    prompts = [body["prompt"] for body in server.bodies]
    assert prompts[1][: len(prompts[0])] == prompts[0] and len(prompts[1]) > len(prompts[0])


@pytest.mark.usefixtures("key")
async def test_a_prefix_that_opens_a_block_of_reasoning_starts_the_response_inside(serve: Serve) -> None:
    server = serve(Scripted([piece("so</think> boil it", "stop")]))
    async with backend(server.url, tokenizer=SERVED) as known:
        [result] = await known.chat([ask(response_prefix="<think>")])
        shown = [each async for each in known.stream(ask(response_prefix="<think>"))]
    assert result.text == "".join(shown) == "<think>boil it"


async def test_a_closed_backend_says_so() -> None:
    box = OpenAIBackend("m", key=None)
    await box.close()
    with pytest.raises(BackendError, match="is closed"):
        await box.chat([ask()])
