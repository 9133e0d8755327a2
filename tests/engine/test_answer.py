"""The text of an answer while its tokens come."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from popi.engine.answer import Answer, settled

END = 256


def decode(tokens) -> str:
    """A token is a byte."""
    return bytes(tokens).decode("utf-8", "replace")


def follow(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    """Feeds tokens as the decoding does; gives the pieces, the text, and whether it came to an end."""
    pieces: list[str] = []
    answer = Answer(decode, {END}, stop, pieces.append)
    for count in range(1, len(tokens) + 1):
        if tokens[count - 1] == END or count == len(tokens) or answer.watch(tokens[:count]):
            return pieces, *answer.finish(tokens[:count])
    return pieces, *answer.finish([])


texts = st.text("ab<>é米🍚\u0627", max_size=20)


@given(texts, st.lists(st.text("ab<>é米", max_size=4), max_size=3), st.booleans())
@example("<b<", ["b", "<b<"], False)
def test_the_pieces_are_the_text_up_to_the_first_stop(text: str, stop: list[str], ends: bool) -> None:
    tokens = [*text.encode(), *([END] if ends else [])]
    pieces, whole, ended = follow(tokens, tuple(stop))
    whole_at = [(text.find(word) + len(word), text.find(word)) for word in stop if word and word in text]
    assert whole == (text[: min(whole_at)[1]] if whole_at else text)
    assert ended == bool(whole_at or ends)
    assert "".join(pieces) == whole
    assert all(pieces)


@given(st.binary(max_size=24))
def test_bytes_that_are_no_text_come_out_as_one_decoding_gives_them(data: bytes) -> None:
    pieces, whole, _ = follow([*data])
    assert "".join(pieces) == whole == data.decode("utf-8", "replace")


def test_a_character_comes_whole() -> None:
    pieces, _, _ = follow([*"a🍚b".encode()])
    assert pieces == ["a", "🍚", "b"]


def test_the_beginning_of_a_stop_is_held_back_until_it_is_known() -> None:
    assert follow([*b"a</x"], ("</s>",))[0] == ["a", "</x"]
    assert follow([*b"a</s>b"], ("</s>",)) == (["a"], "a", True)


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [("abc", ["cd"], 2), ("abc", ["bcd", "cd"], 1), ("abc", [], 3), ("ab\ufffd", ["bé"], 1), ("abc", ["c"], 3)],
)
def test_how_much_is_settled(text: str, stop: list[str], length: int) -> None:
    assert settled(text, stop) == length


def test_the_text_does_not_depend_on_how_it_is_cut_into_tokens() -> None:
    stop = ("b", "<b<")
    assert Answer(decode, {END}, stop).finish([*b"<b<"]) == ("<", True)
    assert follow([*b"<b<"], stop)[1:] == ("<", True)


def test_without_a_stop_or_a_listener_there_is_nothing_to_watch() -> None:
    assert not Answer(decode, {END}, stop=("",)).watches
    assert Answer(decode, {END}, stop=("x",)).watches
    assert Answer(decode, {END}, emit=print).watches
