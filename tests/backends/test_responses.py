"""Responses of models in this process: no reasoning, stop strings outside of it, pieces that add up to the text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from popi.backends.base import ChatRequest, ChatResult
from popi.backends.responses import Response, after_prefix
from popi.prompts import Message

END = 256


def decode(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < END).decode("utf-8", "replace")


def follow(
    text: str, *, ends: bool = True, opened: bool = False, stream: bool = False, **options: object
) -> tuple[ChatResult, list[str]]:
    """Feeds a text byte by byte as decoding does."""
    request, pieces = ChatRequest([Message("user", "why?")], **options), list[str]()
    response = Response(request, decode, {END}, opened=opened, emit=pieces.append if stream else None)
    tokens = [*text.encode(), *([END] if ends else [])]
    count = len(tokens)
    if response.watch is not None:
        count = next((n for n in range(1, count) if response.watch(tokens[:n])), count)
    reason = "stop" if ends or count < len(tokens) else "length"
    return response.result(tokens[:count], reason, prompt_tokens=3, model="m"), pieces


@pytest.mark.parametrize(
    ("text", "options", "shown"),
    [
        ("<think>hm</think> Yes.", {}, "Yes."),
        ("hm</think>\n\nYes.", {"opened": True}, "Yes."),
        ("Yes. <think>sure?</think>Indeed.", {}, "Yes. Indeed."),
        # Stop strings do not end a response inside its reasoning.
        ("<think>a. b.</think>Yes. No.", {"stop": (".",)}, "Yes"),
        # A prefix may close the block that the template opened, or open one.
        ("Yes.", {"opened": True, "response_prefix": "</think>"}, "</think>Yes."),
        ("hm</think>Yes.", {"response_prefix": "<think>"}, "<think>Yes."),
        (" like tea.", {"response_prefix": "They", "stop": ("They",)}, "They like tea."),
        # A block that was never opened was opened by the template.
        ("hm</think>Yes.", {}, "Yes."),
    ],
)
def test_reasoning_is_not_part_of_a_response(text: str, options: dict[str, object], shown: str) -> None:
    result, _ = follow(text, **options)
    assert (result.text, result.error, result.finish_reason) == (shown, None, "stop")


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("<think>I wonder", {"ends": False}, "reasoning used all 15 tokens; raise max_tokens"),
        ("I wonder", {"ends": False, "opened": True}, "reasoning used all 8 tokens; raise max_tokens"),
        ("Yes. <think>or", {"ends": False}, "reasoning used all 14 tokens; raise max_tokens"),
        ("<think>hm", {}, "the model wrote reasoning and no response"),
        ("  \n", {"ends": False}, "all 3 tokens were used without writing text; raise max_tokens"),
        ("", {}, "the model wrote no text"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_without_text_says_why(text: str, options: dict[str, object], reason: str, stream: bool) -> None:
    result, _ = follow(text, stream=stream, **options)
    assert (result.text, result.finish_reason, result.failure) == ("", "error", "empty")
    assert result.error == f"the response is empty: {reason}"
    assert result.completion_tokens == len(text) + options.get("ends", True)


def test_a_stream_that_showed_a_thought_is_malformed() -> None:
    result, pieces = follow("hm</think>Yes.", stream=True)
    assert "".join(pieces).startswith("hm")
    assert result.failure == "malformed" and "reasoning" in (result.error or "")


texts = st.lists(st.sampled_from(["<think>", "</think>", "a", "b ", "é", "🍚", "<", "\n"]), max_size=12).map("".join)


@given(
    texts, st.lists(st.text("ab<é", max_size=3), max_size=2), st.booleans(), st.sampled_from(["", "Well", "<think>"])
)
@example("a<think>b</think>🍚", ["b"], False, "")
def test_the_pieces_of_a_stream_are_the_text(text: str, stop: list[str], opened: bool, prefix: str) -> None:
    options = {"stop": tuple(stop), "opened": opened, "response_prefix": prefix}
    result, pieces = follow(text, stream=True, **options)
    assert all(pieces)
    if result.error is None:
        assert "".join(pieces) == result.text
        assert result == follow(text, **options)[0]
        assert not prefix or pieces[0] == prefix


def test_the_space_after_a_prefix_is_kept() -> None:
    def sentencepiece(tokens: list[int]) -> str:
        return decode(tokens).removeprefix(" ")

    assert after_prefix(sentencepiece, [*b"They"])([*b" like"]) == " like"
    assert after_prefix(sentencepiece, [])([*b" like"]) == "like"
