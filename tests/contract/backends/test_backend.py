"""What every backend promises."""

from __future__ import annotations

import asyncio
import math
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from popi.backends.base import Backend, ChatRequest, ChatResult, ScoreRequest
from popi.errors import BackendError
from popi.prompts import Message
from popi.testing import ScriptedBackend

TEXTS = [
    "What is a good answer?",
    "How do I cook rice 🍚👩‍👩‍👧 quickly",
    "如何煮米饭用简单的话说",
    "كيف أطبخ الأرز؟",
    "",
    "what " * 60,
]


def ask(text: str, **options: object) -> ChatRequest:
    return ChatRequest([Message("user", text)], **{"max_tokens": 12, **options})


def rate(text: str, response: str) -> ScoreRequest:
    return ScoreRequest([Message("user", text)], response)


def resident() -> int:
    """The memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def streamed(backend: Backend, request: ChatRequest) -> list[str]:
    return [piece async for piece in backend.stream(request)]


async def test_chat_gives_one_result_a_request_in_order(backend: Backend) -> None:
    requests = [ask(text) for text in [*TEXTS, *reversed(TEXTS)]]
    together = await backend.chat(requests)
    apart = [(await backend.chat([request]))[0] for request in requests]
    assert together == apart
    assert len({result.text for result in together}) > 1
    assert {result.model for result in together} == {backend.model}
    assert all(result.error is None and result.completion_tokens > 0 for result in together)


async def test_a_batch_of_64_answers_as_64_batches_of_one(backend: Backend) -> None:
    requests = [ask(f"{'Why? ' * (n % 7)}What about {n}?") for n in range(64)]
    together = await backend.chat(requests)
    assert [(await backend.chat([request]))[0] for request in requests] == together
    assert len({result.text for result in together}) > 32


async def test_no_request_no_result(backend: Backend) -> None:
    assert await backend.chat([]) == []
    assert await backend.score([]) == []


@pytest.mark.parametrize("text", TEXTS)
async def test_a_stream_gives_the_answer_of_chat_in_pieces(backend: Backend, text: str) -> None:
    request = ask(text)
    (result,) = await backend.chat([request])
    whole = list[ChatResult]()
    pieces = [piece async for piece in backend.stream(request, whole.append)]
    assert "".join(pieces) == result.text
    assert all(pieces) and whole == [result]


async def test_a_stream_comes_in_pieces(backend: Backend) -> None:
    assert len(await streamed(backend, ask(TEXTS[0]))) > 1


async def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(backend: Backend) -> None:
    free = ask(TEXTS[0], max_tokens=24)
    (whole,) = await backend.chat([free])
    # The first character of the stop string is new there: an earlier one would leave another text, or none.
    text = whole.text
    start = next(n for n in range(1, len(text)) if text[:n].strip() and text[n].isascii() and text[n] not in text[:n])
    word = text[start : start + 3]
    stopping = replace(free, stop=("never said", word))
    sooner = replace(free, stop=(word, word[:1]))
    results = await backend.chat([stopping, free, sooner])
    assert results[0].text == whole.text.partition(word)[0]
    assert results[1] == whole
    assert results[2].text == whole.text.partition(word[:1])[0]
    assert {results[0].finish_reason, results[2].finish_reason} == {"stop"}
    assert "".join(await streamed(backend, stopping)) == results[0].text


async def test_max_tokens_cuts_the_answer(backend: Backend) -> None:
    whole, cut = await backend.chat([ask(TEXTS[0]), ask(TEXTS[0], max_tokens=3)])
    assert cut.finish_reason == "length"
    assert cut.completion_tokens == 3
    assert whole.text.startswith(cut.text.rstrip("\ufffd"))
    assert len(cut.text) < len(whole.text)


async def test_a_request_for_nothing_is_an_error_in_its_result(backend: Backend) -> None:
    nothing, fine = await backend.chat([ask(TEXTS[0], max_tokens=0), ask(TEXTS[0])])
    assert nothing.finish_reason == "error" and nothing.error
    assert fine.error is None


async def test_an_over_long_conversation_is_an_error_in_its_result(case) -> None:
    async with case.make(100) as backend:
        assert backend.capabilities.context_length == 100
        long = "what " * 200
        fine, failed = await backend.chat([ask("hello"), ask(long)])
        assert fine.error is None and fine.text
        assert (failed.text, failed.finish_reason) == ("", "error")
        assert failed.error and "100" in failed.error and "\n" not in failed.error
        assert failed.prompt_tokens > 100
        good, bad, worse = await backend.score([rate("hello", "yes"), rate(long, "yes"), rate("hello", long)])
        assert good.error is None
        assert math.isnan(bad.logprob) and bad.error
        assert math.isnan(worse.logprob) and worse.error
        with pytest.raises(BackendError, match="100"):
            await streamed(backend, ask(long))


async def test_an_answer_takes_no_more_than_the_context_leaves(case) -> None:
    async with case.make(64) as backend:
        (result,) = await backend.chat([ask("answer " * 40, max_tokens=1000)])
        assert result.error is None
        assert result.prompt_tokens + result.completion_tokens <= 64


async def test_a_seed_samples_the_same_in_any_batch(backend: Backend) -> None:
    requests = [ask(text, temperature=1.0, top_p=0.95, seed=seed) for text in TEXTS for seed in (1, 2)]
    together = await backend.chat(requests)
    assert together == list(reversed(await backend.chat(list(reversed(requests)))))
    assert [(await backend.chat([request]))[0] for request in requests] == together
    assert "".join(await streamed(backend, requests[3])) == together[3].text


async def test_scores_do_not_depend_on_the_batch(backend: Backend) -> None:
    requests = [rate(text, response) for text in TEXTS for response in ("Yes.", "No, 🍚 never.", "")]
    together = await backend.score(requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = await backend.score([request])
        assert result.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert replace(result, logprob=0.0) == replace(alone, logprob=0.0)
        assert result.error is None
        assert result.logprob < 0
        assert result.tokens >= 1


async def test_an_end_of_turn_is_part_of_every_score(backend: Backend) -> None:
    empty, one = await backend.score([rate("hello", ""), rate("hello", "a")])
    assert empty.tokens >= 1
    assert one.tokens == empty.tokens + backend.count_tokens("a")


async def test_a_log_probability_that_is_not_finite_is_a_failed_item(case) -> None:
    async with case.make(512) as backend:
        case.poison(backend)
        for result in await backend.score([rate("hello", "yes"), rate("hello", "no, never")]):
            assert (math.isnan(result.logprob), result.failure) == (True, "malformed")
            assert result.error and "\n" not in result.error


async def test_an_identity_tells_what_responds(case) -> None:
    async with case.make(512) as one, case.make(512) as same, case.other(512) as other:
        assert one.identity == same.identity != other.identity
        assert one.identity and "\n" not in one.identity


async def test_every_backend_takes_summaries(backend: Backend) -> None:
    assert "summary" in backend.capabilities.interfaces <= {"summary", "embedding"}


async def test_a_dead_backend_is_an_exception_of_one_line(case) -> None:
    async with case.make(512) as backend:
        case.kill(backend)
        for call in (
            backend.chat([ask("hello")]),
            backend.score([rate("hello", "yes")]),
            streamed(backend, ask("hello")),
        ):
            with pytest.raises(BackendError) as caught:
                await call
            assert "\n" not in str(caught.value)


async def test_a_stream_that_is_left_leaves_the_backend_usable(backend: Backend) -> None:
    stream = backend.stream(ask(TEXTS[0], max_tokens=400))
    assert await anext(stream)
    await stream.aclose()
    (result,) = await asyncio.wait_for(backend.chat([ask(TEXTS[0])]), timeout=20)
    assert result.error is None


async def test_a_call_that_is_cancelled_leaves_the_backend_usable(backend: Backend) -> None:
    call = asyncio.create_task(backend.chat([ask(f"What is {n}?", max_tokens=400) for n in range(50)]))
    await asyncio.sleep(0.05)
    call.cancel()
    await asyncio.wait([call], timeout=20)
    assert call.cancelled() or (call.done() and isinstance(backend, ScriptedBackend))  # which is done by then
    (result,) = await asyncio.wait_for(backend.chat([ask(TEXTS[0])]), timeout=20)
    assert result.error is None


@pytest.mark.slow
async def test_a_thousand_calls_at_once_are_answered_in_bounded_memory(backend: Backend) -> None:
    await backend.chat([ask("What is 0?", max_tokens=2)])
    before = highest = resident()

    async def watch() -> None:
        nonlocal highest
        while True:
            highest = max(highest, resident())
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(backend.chat([ask(f"What is {n}?", max_tokens=2)]) for n in range(1000)))
    watching.cancel()
    assert all(result.error is None for [result] in answers)
    assert max(highest, resident()) - before < 256 * 2**20


async def test_counting_needs_no_conversation(backend: Backend) -> None:
    assert backend.count_tokens("") == 0
    assert 0 < backend.count_tokens("one") < backend.count_tokens("one two three four")


async def test_closing_twice_is_harmless(case) -> None:
    backend = case.make(512)
    await backend.close()
    await backend.close()


async def test_a_bad_request_does_not_stop_the_others(backend: Backend) -> None:
    half, control = ask("half \ud83d of a pair"), ask("a bell \x07 and \x00\x1b[2J")
    bad = [half, control, ask("too long " * 600), ask("nothing", max_tokens=0), ask("half", response_prefix="\ud83d")]
    results = await backend.chat([ask("hello"), *bad, ask("hello")])
    assert results[0].error is None and results[-1] == results[0]
    for result in results:
        assert result.error is None or "\n" not in result.error
        assert result.text.encode() or result.failure
    good, *_, last = await backend.score([rate("hello", "yes"), rate("\ud83d", "\ud83d\x00"), rate("hello", "yes")])
    assert good.error is None and last.error is None
    # The order in which a batch is summed up differs with its other requests.
    assert last.logprob == pytest.approx(good.logprob, abs=1e-4)


async def test_a_response_can_always_be_written(backend: Backend) -> None:
    """Half a character in the conversation may come back."""
    for text in ("half \ud83d of a pair", "\udc00"):
        [result] = await backend.chat([ask(text, max_tokens=40)])
        assert result.failure == "empty" or result.text.encode()
        pieces = await streamed(backend, ask(text, max_tokens=40)) if result.error is None else []
        assert "".join(pieces) == result.text
