"""What property tests draw from: words as people write them, signals of every kind, and examples."""

from __future__ import annotations

from datetime import UTC

from hypothesis import strategies as st

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.signals import (
    Comment,
    Conversation,
    Demographics,
    Edit,
    PreferencePair,
    Rating,
    Signal,
    Speaker,
    Statement,
    Turn,
    UserSignals,
)

HARD_WORDS = ("👩‍👩‍👧", "שלום", "مرحبا", "日本語", "a\x00b", "e\u0301", "{prompt}", "<<<", ">>>", "[1]", "\\ud800", '"')

words = st.text(min_size=1).map(str.strip).filter(bool) | st.sampled_from(HARD_WORDS)
speakers = st.sampled_from(Speaker)
shared = {
    "time": st.none() | st.datetimes(timezones=st.none() | st.just(UTC)),
    "origin": st.text(max_size=3).map(str.strip),
    "said_by": speakers,
}

signals: st.SearchStrategy[Signal] = st.one_of(
    st.builds(
        lambda answers, **rest: PreferencePair(chosen=answers[0], rejected=answers[1], **rest),
        answers=st.lists(words, min_size=2, max_size=2, unique_by=str.strip),
        prompt=words,
        **shared,
    ),
    st.builds(Comment, text=words, about=st.just("") | words, prompt=st.just("") | words, **shared),
    st.builds(Rating, prompt=words, response=words, score=st.floats(1, 5), **shared),
    st.builds(
        lambda texts, **rest: Edit(original=texts[0], edited=texts[1], **rest),
        texts=st.lists(words, min_size=2, max_size=2, unique_by=str.strip),
        prompt=words,
        **shared,
    ),
    st.builds(Statement, text=words, **shared),
    st.builds(Demographics, facts=st.dictionaries(words, words, min_size=1, max_size=3), **shared),
    st.builds(
        Conversation,
        turns=st.lists(st.builds(Turn, speaker=speakers, text=words), min_size=1, max_size=4).map(tuple),
        **shared,
    ),
)


def users(max_size: int = 6) -> st.SearchStrategy[UserSignals]:
    """Users with up to so many signals."""
    lists = st.lists(signals, max_size=max_size, unique_by=lambda signal: signal.id)
    return st.builds(UserSignals, user_id=words, signals=lists.map(tuple))


pairs = st.builds(
    lambda prompt, answers: HeldOutPair(prompt=prompt, chosen=answers[0], rejected=answers[1]),
    words,
    st.lists(words, min_size=2, max_size=2, unique_by=str.strip),
)
facts = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
examples = st.builds(
    PersonalizationExample,
    user=users(max_size=2),
    tests=st.lists(pairs, max_size=2).map(tuple),
    oracles=st.dictionaries(words, words, max_size=2),
    facts=st.dictionaries(words, facts, max_size=2),
)
