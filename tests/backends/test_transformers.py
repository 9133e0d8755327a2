"""Batching, padding and sharing change nothing; failures are one line; work stops when nobody waits for it."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from popi.backends import transformers
from popi.backends.base import ChatRequest, ScoreRequest
from popi.backends.transformers import TransformersBackend
from popi.engine.checks import verify
from popi.errors import BackendError
from popi.prompts import Message
from tests.forks import needs_fork, succeeds_in_child
from tests.plain_loops import conversation, plain_score, plain_tokens

RESPONSES = ["Yes.", "A short answer with a friendly tone 🍚, and examples.", "", "如何煮米饭"]


def chats(**options: object) -> list[ChatRequest]:
    return [ChatRequest(conversation(i), **{"max_tokens": 6 + i % 5, **options}) for i in range(64)]


def ratings() -> list[ScoreRequest]:
    return [ScoreRequest(conversation(i), RESPONSES[i % 3]) for i in range(64)]


async def test_greedy_text_is_that_of_a_plain_loop(make, tiny) -> None:
    model, tokenizer = tiny
    for request, result in zip(chats()[:12], await make().chat(chats()[:12]), strict=True):
        tokens = plain_tokens(model, tokenizer, request.messages, request.max_tokens)
        assert result.completion_tokens == len(tokens)
        assert result.text == tokenizer.decode(tokens, skip_special_tokens=True)


async def test_scores_are_those_of_a_plain_loop(make, tiny) -> None:
    for request, result in zip(ratings(), await make().score(ratings()), strict=True):
        assert result.logprob == pytest.approx(plain_score(*tiny, request.messages, request.response), abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
@pytest.mark.parametrize("layout", ["shared", "padded"])
async def test_neither_chunks_nor_the_layout_change_anything(monkeypatch, make, batch_tokens: int, layout: str) -> None:
    usual = make()
    monkeypatch.setattr(transformers, "verify", lambda *args: replace(verify(*args), layout=layout))
    other = make(batch_tokens=batch_tokens)
    requests = chats()[:8] + chats(temperature=0.9, top_p=0.9, seed=7)[8:16]
    assert await other.chat(requests) == await usual.chat(requests)
    some = ratings()[:24]
    for result, expected in zip(await other.score(some), await usual.score(some), strict=True):
        assert result.logprob == pytest.approx(expected.logprob, abs=1e-4)


async def test_a_request_samples_the_same_whatever_it_is_batched_with(make) -> None:
    backend = make()
    requests = [
        ChatRequest(conversation(i), max_tokens=10, temperature=0.5 + i % 3, top_p=1 - 0.2 * (i % 2), seed=i)
        for i in range(24)
    ]
    together = await backend.chat(requests)
    mixed = await backend.chat([*chats(), *requests[::-1]])
    assert mixed[:63:-1] == together
    assert together != await backend.chat([ChatRequest(r.messages, 10, r.temperature, seed=99) for r in requests])


async def test_without_a_seed_two_samples_differ(make) -> None:
    request = ChatRequest(conversation(3), max_tokens=20, temperature=1.5)
    one, other = await make().chat([request, request])
    assert one.text != other.text


async def test_the_model_s_end_token_ends_an_answer(make, tiny) -> None:
    model, tokenizer = tiny
    (whole,) = await make().chat([ChatRequest(conversation(5), max_tokens=12)])
    tokens = plain_tokens(model, tokenizer, conversation(5), 12)
    assert whole.finish_reason == "length"
    end = tokens[4]
    model.generation_config.eos_token_id = [tokenizer.pad_token_id, end]
    (result,) = await make().chat([ChatRequest(conversation(5), max_tokens=12)])
    first = tokens.index(end)
    assert result.finish_reason == "stop"
    assert result.completion_tokens == first + 1
    assert result.text == tokenizer.decode(tokens[:first], skip_special_tokens=True)


async def test_identical_prompts_are_computed_once(make, tiny) -> None:
    backend = make()
    seen = count_inputs(tiny[0])
    request = ChatRequest([Message("user", "answer " * 50)], max_tokens=5, temperature=1.0)
    results = await backend.chat([request] * 8)
    prompt = results[0].prompt_tokens
    # The last token of the prompt runs with the answers, once for each; then four tokens each, at most.
    assert prompt - 1 < sum(seen) <= prompt - 1 + 8 * 5


async def test_a_common_context_is_scored_once(make, tiny) -> None:
    backend = make()
    seen = count_inputs(tiny[0])
    requests = [
        ScoreRequest([Message("user", "the user prefers " * 40 + question)], response)
        for question in ("what?", "how?", "which?")
        for response in ("yes", "no answer")
    ]
    results = await backend.score(requests)
    apart = sum(result.prompt_tokens + result.tokens for result in results)
    assert sum(seen) < apart / 3


async def test_logits_are_computed_where_a_response_token_is_scored(make, tiny) -> None:
    backend = make()
    rows: list[int] = []
    tiny[0].get_output_embeddings().register_forward_hook(
        lambda module, args, logits: rows.append(logits.shape[:-1].numel())
    )
    results = await backend.score(ratings())
    assert sum(rows) == sum(result.tokens for result in results)


async def test_a_model_in_training_stays_in_training(make, tiny) -> None:
    model, _ = tiny
    model.train()
    before = await make().score(ratings()[:2])
    assert model.training
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    assert await make().score(ratings()[:2]) != before


async def test_results_that_are_not_finite_are_failed_items(make, tiny) -> None:
    model, tokenizer = tiny
    [token] = tokenizer("?", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token].fill_(math.nan)
    backend, bad = make(), [Message("user", "why?")]
    good = await backend.chat(chats()[:6])
    failed, *others = await backend.chat([ChatRequest(bad, max_tokens=6), *chats()[:6]])
    assert (failed.finish_reason, failed.failure, failed.text) == ("error", "malformed", "")
    assert failed.error == "the logits of the model are not finite"
    assert others == good
    scores = await backend.score([ScoreRequest(bad, "yes"), *ratings()[:2]])
    assert scores[0].failure == "malformed" and "not finite" in (scores[0].error or "")
    assert all(score.error is None for score in scores[1:])


async def test_a_live_model_computes_within_what_its_owner_says(tiny) -> None:
    model, tokenizer = tiny
    contexts = nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)
    backends = [TransformersBackend.from_model(model, tokenizer, "tiny", within=within) for within in contexts]
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
    for backend in backends:
        await backend.score(ratings()[:1])
    assert seen == [torch.float32, torch.bfloat16]


async def test_out_of_memory_is_an_exception_of_one_line(make, tiny) -> None:
    def forward(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nsee the manual")

    backends = make(), make()
    tiny[0].forward = forward
    for call in (backends[0].chat(chats()[:2]), backends[1].score(ratings()[:2])):
        with pytest.raises(BackendError) as caught:
            await call
        assert str(caught.value) == "tiny: out of memory; lower batch_tokens or use a smaller model"


async def test_a_template_s_refusal_is_an_error_in_the_result(tiny) -> None:
    model, tokenizer = tiny
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no user turn') }}{% endif %}"
        + tokenizer.chat_template
    )
    backend = TransformersBackend.from_model(model, tokenizer, "tiny")
    refused = [Message("assistant", "hello"), Message("user", "hello")]
    bad, good = await backend.chat([ChatRequest(refused), ChatRequest(conversation(0), max_tokens=4)])
    assert bad.finish_reason == "error" and "no user turn" in (bad.error or "")
    assert good.error is None
    (score,) = await backend.score([ScoreRequest(refused, "yes")])
    assert math.isnan(score.logprob) and "no user turn" in (score.error or "")


@pytest.fixture
def slowly(tiny) -> list[float]:
    """Makes every step of the model take at least 20 ms; gives the times at which they began."""
    model, _ = tiny
    times: list[float] = []
    model.register_forward_pre_hook(lambda *_: (times.append(time.monotonic()), time.sleep(0.02))[:0])
    # No end in sight.
    model.generation_config.eos_token_id = None
    return times


async def test_the_event_loop_stays_free(make, slowly: list[float]) -> None:
    beats, backend = 0, make()
    slowly.clear()
    work = asyncio.create_task(backend.chat([ChatRequest(conversation(8), max_tokens=10)]))
    while not work.done():
        await asyncio.sleep(0.01)
        beats += 1
    assert len(slowly) > 2
    assert beats >= len(slowly)


@pytest.mark.parametrize("way", ["chat", "stream"])
async def test_cancelled_work_stops_between_two_steps(make, slowly: list[float], way: str) -> None:
    backend = make()
    slowly.clear()
    request = ChatRequest(conversation(8), max_tokens=400)
    if way == "chat":
        task = asyncio.create_task(backend.chat([request]))
        while not slowly:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        stream = backend.stream(request)
        await anext(stream)
        await stream.aclose()
    await backend.score(ratings()[:1])
    assert len(slowly) < 100


async def test_a_closed_backend_says_so(make) -> None:
    backend = make()
    await backend.close()
    with pytest.raises(BackendError, match="closed"):
        await backend.chat(chats()[:1])


def test_one_backend_serves_one_event_loop_after_the_other(make) -> None:
    backend = make()
    first, second = (asyncio.run(backend.chat(chats()[:2])) for _ in range(2))
    assert first == second


def count_inputs(model) -> list[int]:
    """Collects how many tokens go through the model, padding included."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    return seen


async def test_a_seed_may_be_of_any_size(make) -> None:
    request = ChatRequest(conversation(0), max_tokens=4, temperature=1.0, seed=2**64 + 3)
    assert (await make().chat([request]))[0].error is None


async def test_closing_fails_the_calls_that_have_not_ended(make, slowly: list[float]) -> None:
    backend = make()
    slowly.clear()
    calls = [asyncio.create_task(backend.chat(chats()[:2])) for _ in range(2)]
    while not slowly:
        await asyncio.sleep(0.01)
    await backend.close()
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, BackendError) and "is closed" in str(outcome)
    assert len(slowly) < 6


async def test_the_identity_names_weights_tokenizer_and_dtype(make, tiny) -> None:
    model, _ = tiny
    backend = make()
    before = backend.identity
    assert before.startswith("tiny ") and before.endswith("dtype=float32")
    assert make().identity == before
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    assert backend.identity != before
    loaded = TransformersBackend("popi-mini-writer")
    assert loaded.identity == TransformersBackend("popi-mini-writer", batch_tokens=100).identity
    assert loaded.identity != TransformersBackend("popi-mini-writer", dtype="bfloat16").identity


async def test_a_response_without_any_text_is_a_failed_item(make, tiny) -> None:
    model, _ = tiny
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    for result in await make().chat([ChatRequest(conversation(0), response_prefix=prefix) for prefix in ("Yes", "")]):
        assert (result.text, result.failure, result.completion_tokens) == ("", "empty", 1)
        assert result.error == "the response is empty: the model wrote no text"


async def test_concurrent_calls_cost_as_many_passes_as_one_call(make, tiny) -> None:
    passes: list[int] = []
    tiny[0].register_forward_pre_hook(lambda *_: passes.append(1))
    backend = make()
    requests = [ChatRequest(conversation(2 * i), max_tokens=24) for i in range(16)]
    together = await backend.chat(requests)
    of_one_call = len(passes)
    apart = await asyncio.gather(*(backend.chat([request]) for request in requests))
    assert [result for [result] in apart] == together
    # They arrive while the first of them are computed.
    assert len(passes) - of_one_call <= 1.3 * of_one_call + 5


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_uses_the_backend(make) -> None:
    backend = make()
    expected = asyncio.run(backend.chat(chats()[:2]))
    assert succeeds_in_child(lambda: asyncio.run(backend.chat(chats()[:2])) == expected)
    assert asyncio.run(backend.chat(chats()[:2])) == expected
