"""What a model produced, as a result or as a failure; and its pieces, which are the same text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.backends.base import ChatRequest, FinishReason
from popi.backends.results import Pieces, complete, scored
from popi.prompts import Message
from popi.reasoning import MARKERS

TEXTS = st.lists(
    st.sampled_from([*MARKERS, *MARKERS.values(), "a", " ", "\n", "<", "think>", "\ud83d", "\ude00", "é", "\x00"]),
    max_size=12,
)


def ask(prefix: str = "", max_tokens: int = 9) -> ChatRequest:
    return ChatRequest([Message("user", "Why?")], max_tokens=max_tokens, response_prefix=prefix)


@given(TEXTS, st.sampled_from(["", "So: ", "<think>", "<think>a</think>", " ", "\ud83d"]), st.booleans())
def test_the_pieces_are_the_text_of_the_result(parts: list[str], prefix: str, opened: bool) -> None:
    request, text = ask(prefix), "".join(parts)
    result = complete(text, "stop", request, model="m", opened=opened)
    for split in (parts, list(text), [text]):
        pieces = Pieces(request, opened=opened)
        shown = [pieces.feed(part) for part in split] + [pieces.finish()]
        if not pieces.orphan and result.error is None:
            assert "".join(shown) == result.text
    assert result.text.encode() is not None
    assert (result.error is None) == bool(result.text) == (result.failure is None)


@pytest.mark.parametrize(
    ("text", "reason", "more", "why"),
    [
        ("", "stop", {}, "the model wrote no text"),
        ("", "length", {}, "all 9 tokens were used without writing text; raise max_tokens"),
        ("", "length", {"completion_tokens": 7}, "all 7 tokens were used"),
        ("", "length", {"reasoned": True}, "reasoning used all 9 tokens; raise max_tokens"),
        ("<think>so", "length", {}, "reasoning used all 9 tokens; raise max_tokens"),
        ("so I will", "length", {"opened": True}, "reasoning used all 9 tokens; raise max_tokens"),
        ("<think>so", "stop", {}, "the model wrote reasoning and no response"),
        ("", "stop", {"reasoned": True}, "the model wrote reasoning and no response"),
        ("", "stop", {"tool_calls": True}, "the model called tools instead of writing text"),
    ],
)
def test_an_empty_response_is_a_failure_that_says_why(text: str, reason: FinishReason, more: dict, why: str) -> None:
    result = complete(text, reason, ask(), model="m", prompt_tokens=3, **more)
    assert (result.text, result.finish_reason, result.failure) == ("", "error", "empty")
    assert str(result.error).startswith(f"the response is empty: {why}")
    assert (result.prompt_tokens, result.completion_tokens) == (3, more.get("completion_tokens", 0))


@pytest.mark.parametrize("reason", ["refused", "filtered"])
def test_a_refusal_and_a_filter_may_leave_no_text(reason: FinishReason) -> None:
    result = complete("", reason, ask(), model="m")
    assert (result.text, result.finish_reason, result.failure) == ("", reason, None)


def test_nothing_behind_a_prefix_is_an_empty_response() -> None:
    assert complete("", "stop", ask("So: "), model="m").failure == "empty"
    assert complete("fine", "stop", ask("So: "), model="m").text == "So: fine"
    assert complete("why</think> fine", "stop", ask("<think>"), model="m").text == "<think>fine"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_a_failure(value: float) -> None:
    result = scored(value, 3, model="m", prompt_tokens=2)
    assert math.isnan(result.logprob) and result.failure == "malformed"
    assert f"the log-probability is not finite ({value})" in str(result.error) and result.prompt_tokens == 2
    assert scored(-1.5, 3, model="m", prompt_tokens=2).logprob == -1.5
