"""Reasoning blocks are removed, however the text is split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.reasoning import MARKERS, ReasoningFilter, strip_reasoning

PARTS = st.lists(
    st.sampled_from([*MARKERS, *MARKERS.values(), "a", " ", "\n", "<", "<th", "think>", "|>", "[TH"]), max_size=12
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Yes.", "Yes."),
        ("<think>\nso\n</think>\n\nYes.", "Yes."),
        ("so\n</think>\n\nYes.", "Yes."),
        ("<think></think>Yes.", "Yes."),
        ("[THINK]hm[/THINK]Yes <think>again</think>and no.", "Yes and no."),
        ("<|channel|>analysis<|message|>hm<|channel|>final<|message|>Yes.", "Yes."),
        ("<think>so I will", None),
        ("<think>so</think>Yes <thinking>but", None),
        ("a <b> c", "a <b> c"),
        ("  Yes. ", "  Yes. "),
        (" \n<think>so</think> Yes.", "Yes."),
        ("</think>Yes.", "Yes."),
        (" \n</think>\nYes.", "Yes."),
        ("Yes <think>so</think> and no.", "Yes  and no."),
        ("<think>a</thinking>b</think>c", "c"),
        ("", ""),
    ],
)
def test_a_block_is_removed_and_one_that_does_not_end_leaves_no_response(text: str, shown: str | None) -> None:
    assert strip_reasoning(text) == shown


@given(PARTS, st.booleans())
def test_the_visible_text_does_not_depend_on_the_split(parts: list[str], opened: bool) -> None:
    whole, split = ReasoningFilter(opened=opened), ReasoningFilter(opened=opened)
    text = whole.feed("".join(parts)) + whole.finish()
    pieces = [split.feed(character) for character in "".join(parts)]
    assert "".join(pieces) + split.finish() == text
    assert (split.inside, split.orphan) == (whole.inside, whole.orphan)


@given(st.lists(st.sampled_from(["so ", "a\nb", " "]), max_size=4), st.sampled_from(sorted(MARKERS.items())), PARTS)
def test_no_word_of_a_block_is_visible(words: list[str], markers: tuple[str, str], parts: list[str]) -> None:
    block = f"{markers[0]}SECRET {''.join(words)}{markers[1]}"
    reasoning = ReasoningFilter()
    text = reasoning.feed("Well, " + block + "".join(parts)) + reasoning.finish()
    assert text.startswith("Well, ") and "SECRET" not in text


def test_a_closing_marker_without_an_opening_one_is_noticed() -> None:
    reasoning = ReasoningFilter()
    assert reasoning.feed("so</think>Yes") + reasoning.finish() == "so</think>Yes"
    assert reasoning.orphan


@pytest.mark.parametrize("start", ["", " \n"])
def test_a_closing_marker_before_all_text_ends_a_block_of_the_template(start: str) -> None:
    reasoning = ReasoningFilter()
    assert [reasoning.feed(start), reasoning.feed("</think>"), reasoning.feed("\nYes")] == ["", "", "Yes"]
    assert not reasoning.orphan and not reasoning.inside


def test_text_is_shown_as_soon_as_it_cannot_begin_a_marker() -> None:
    reasoning = ReasoningFilter()
    assert [reasoning.feed(piece) for piece in ("short ", "<", "b", "> answers")] == ["short ", "", "<b", "> answers"]
