"""Which fields a request has, under which names, and what happens if the server rejects one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from popi.backends.base import ChatRequest, ChatResult, ScoreRequest
from popi.backends.openai import OpenAIBackend
from popi.errors import ConfigError
from popi.prompts import Message
from tests.faults import Scripted, ScriptedServer, Serve, piece
from tests.servers import SERVED

FINE = Scripted([piece("fine", "stop")])
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "seed": 3}


def ask(**options: Any) -> ChatRequest:
    return ChatRequest([Message("user", "Why?")], **{"max_tokens": 9, **options})


def backend(server: ScriptedServer, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("m", base_url=server.url, key=None, **options)


async def body_of(server: ScriptedServer, request: ChatRequest, **options: Any) -> dict[str, Any]:
    async with backend(server, **options) as served:
        assert (await served.chat([request]))[0].text == "fine"
    return server.bodies[-1]


MESSAGES = [{"role": "user", "content": "Why?"}]
GREEDY = {"model": "m", "messages": MESSAGES, "max_tokens": 9, "temperature": 0.0}


async def test_fields_that_change_nothing_are_not_sent(serve: Serve) -> None:
    server = serve(FINE)
    assert await body_of(server, ask()) == GREEDY
    assert await body_of(server, ask(seed=3, top_p=0.9)) == GREEDY
    assert await body_of(server, ask(temperature=1.0)) == {**GREEDY, "temperature": 1.0}
    assert await body_of(server, ask(**SAMPLED, stop=("\n",))) == {**GREEDY, **SAMPLED, "stop": ["\n"]}
    known = await body_of(server, ask(seed=3), tokenizer=SERVED)
    assert known.keys() == {"model", "prompt", "max_tokens", "temperature", "stop_token_ids"}


async def test_options_rename_drop_and_add_fields(serve: Serve) -> None:
    fields = {"max_tokens": "max_completion_tokens", "seed": None, "top_p": "nucleus"}
    extra = {"reasoning_effort": "low", "provider": {"order": ["a"]}}
    body = await body_of(server := serve(FINE), ask(**SAMPLED), fields=fields, extra=extra)
    expected = {"model": "m", "messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0.7, "nucleus": 0.9}
    assert body == {**expected, **extra}
    async with backend(server, fields={"stream_options": None}) as served:
        assert [each async for each in served.stream(ask())] == ["fine"]
    assert server.bodies[-1] == {**GREEDY, "stream": True}


async def test_openais_own_server_has_another_name_for_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for url in (None, "https://api.openai.com/v1/"):
        served = OpenAIBackend("m", base_url=url, key="KEY")
        assert "max_completion_tokens" in served._endpoint._fields.attempt({"max_tokens": 9}).body()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {"max_token": "x"}}, "field fields.max_token: cannot be renamed; did you mean max_tokens"),
        ({"fields": {"messages": "x"}}, "field fields.messages: cannot be renamed"),
        ({"fields": {"max_tokens": None}}, "field fields.max_tokens: cannot be dropped, only renamed"),
        ({"fields": {"stop": None}}, "field fields.stop: cannot be dropped, only renamed"),
        ({"fields": {"seed": "top_p"}}, "field fields.seed: cannot be renamed to 'top_p'"),
        ({"fields": {"seed": ""}}, "field fields.seed: cannot be renamed to ''"),
        ({"extra": {"temperature": 1}}, "field extra.temperature: is a field that popi sets itself"),
        ({"extra": {"n": 2}}, "field extra.n: is a field that popi sets itself"),
        ({"fields": {"seed": "random"}, "extra": {"random": 1}}, "field extra.random: is a field that popi sets"),
        ({"extra": {"x": float("nan")}}, "field extra: must contain only JSON values"),
        ({"extra": {"x": b"bytes"}}, "field extra: must contain only JSON values"),
    ],
    ids=str,
)
def test_options_that_cannot_be_followed_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAIBackend("m", key=None, **options)
    assert message in str(caught.value)


def rejects(message: str, *fields: str, param: str | None = None) -> Callable[[dict[str, Any]], Scripted]:
    """Rejects requests that have all these fields, as OpenAI's server does."""
    error = {"error": {"message": message, "type": "invalid_request_error", "param": param}}
    return lambda body: Scripted(error, status=400) if {*fields} <= body.keys() else FINE


def forbids(*allowed: str) -> Callable[[dict[str, Any]], Scripted]:
    """Rejects requests with other fields than these, as FastAPI does."""

    def script(body: dict[str, Any]) -> Scripted:
        known = {"model", "messages", "stream", *allowed}
        details = [
            {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
            for name in body
            if name not in known
        ]
        return Scripted({"detail": details}, status=422) if details else FINE

    return script


REJECTIONS = {
    "top_p beside temperature": (
        rejects("temperature and top_p cannot both be given", "top_p", "temperature"),
        {"top_p"},
    ),
    "temperature by its param": (
        rejects("Only the default is supported", "temperature", param="temperature"),
        {"temperature"},
    ),
    "another value of temperature": (
        rejects("Unsupported value: 'temperature' does not support 0.7 with this model.", "temperature"),
        {"temperature"},
    ),
    "max_tokens": (
        rejects("Unsupported parameter: 'max_tokens'; use max_completion_tokens", "max_tokens"),
        {"max_tokens"},
    ),
    "stream_options": (rejects("stream_options is not supported", "stream_options"), {"stream_options"}),
    "seed": (forbids("max_tokens", "temperature", "top_p", "stream_options"), {"seed"}),
    "several": (forbids("max_completion_tokens", "temperature"), {"seed", "top_p", "max_tokens", "stream_options"}),
}


@pytest.mark.parametrize(("script", "rejected"), REJECTIONS.values(), ids=REJECTIONS)
async def test_a_rejected_field_is_left_out_or_renamed_from_then_on(
    serve: Serve, caplog: pytest.LogCaptureFixture, script: Callable[[dict[str, Any]], Scripted], rejected: set[str]
) -> None:
    caplog.set_level(logging.WARNING)
    server = serve(script)
    async with backend(server) as served:
        for _ in range(2):
            assert (await served.chat([ask(**SAMPLED)]))[0].text == "fine"
            assert [each async for each in served.stream(ask(**SAMPLED))] == ["fine"]
    # One additional request for each field.
    assert len(server.bodies) == 4 + len(rejected)
    assert len(caplog.messages) == len(rejected)
    for name in rejected:
        how = "sending it as max_completion_tokens" if name == "max_tokens" else "no longer sending it"
        assert sum(message.startswith(f"m rejects {name}, {how}: HTTP 4") for message in caplog.messages) == 1
        assert all("\n" not in message for message in caplog.messages)


async def test_many_requests_at_once_learn_it_together(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with backend(serve(forbids("max_tokens", "temperature"))) as served:
        batches = await asyncio.gather(*(served.chat([ask(**SAMPLED)] * 8) for _ in range(4)))
    assert {result.text for batch in batches for result in batch} == {"fine"}
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("temperature must be between 0 and 2", "temperature"),
        ("max_tokens is too large: 9. This model supports at most 4 completion tokens", "max_tokens"),
        ("body.temperature: Input should be less than or equal to 2", None),
        ("This model's maximum context length is 8 tokens; reduce max_tokens", None),
        ("Invalid value for seed", "messages"),
        ("Unsupported parameter: 'stop'", "stop"),
        ("no such thing", None),
    ],
)
async def test_a_value_that_the_server_rejects_is_the_requests_own_failure(
    serve: Serve, message: str, param: str | None
) -> None:
    server = serve(rejects(message, "model", param=param))
    async with backend(server) as served:
        [result] = await served.chat([ask(**SAMPLED, stop=("x",))])
    assert (result.failure, result.error) == ("request", f"HTTP 400: {message}")
    assert len(server.bodies) == 1


async def test_a_change_that_does_not_help_is_taken_back(serve: Serve) -> None:
    def script(body: dict[str, Any]) -> Scripted:
        name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        return Scripted({"error": {"message": f"Unknown parameter: {name}"}}, status=400)

    server = serve(script)
    async with backend(server) as served:
        results = [(await served.chat([ask()]))[0] for _ in range(2)]
    assert {result.error for result in results} == {"HTTP 400: Unknown parameter: max_tokens"}
    assert [len(body.keys() & {"max_tokens"}) for body in server.bodies] == [1, 0, 1, 0]


async def test_a_field_is_learnt_although_the_request_fails_for_another_reason(serve: Serve) -> None:
    def script(body: dict[str, Any]) -> Scripted:
        message = "seed is not supported" if "seed" in body else "the prompt is too long"
        return Scripted({"error": {"message": message}}, status=400)

    server = serve(script)
    async with backend(server) as served:
        for _ in range(2):
            [result] = await served.chat([ask(**SAMPLED)])
            assert result.error == "HTTP 400: the prompt is too long"
    assert len(server.bodies) == 3


async def test_a_rejection_behind_status_200_is_one(serve: Serve) -> None:
    error = {"error": {"code": 400, "message": "seed is not supported"}}
    async with backend(serve(lambda body: Scripted(error) if "seed" in body else FINE)) as served:
        assert (await served.chat([ask(**SAMPLED)]))[0].text == "fine"


async def test_scores_need_no_field_that_decides_about_sampling(serve: Serve) -> None:
    logprobs = {"token_logprobs": [None, *[-1.0] * 100]}
    server = serve(Scripted({"choices": [{"text": "", "logprobs": logprobs}]}))
    async with backend(server, tokenizer=SERVED) as served:
        [result] = await served.score([ScoreRequest([Message("user", "Why?")], "So.")])
    assert result.logprob == -result.tokens
    assert server.bodies[0].keys() == {"model", "prompt", "max_tokens", "echo", "logprobs"}


async def test_stop_token_ids_may_be_rejected(serve: Serve) -> None:
    server = serve(rejects("Unrecognized request argument supplied: stop_token_ids", "stop_token_ids"))
    async with backend(server, tokenizer=SERVED) as served:
        results: list[ChatResult] = await served.chat([ask()])
    assert results[0].text == "fine"
