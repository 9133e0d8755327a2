from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.data.convert import Conversion
from popi.data.cutting import MARK, AnswerCutter, count_words, cut_text
from popi.data.example import HeldOutPair, PersonalizationExample, find_unusable
from popi.errors import InputError
from popi.signals import (
    Comment,
    Conversation,
    Edit,
    PreferencePair,
    Rating,
    Signal,
    Speaker,
    Statement,
    Turn,
    UserSignals,
)
from tests import strategies

pieces = st.sampled_from(
    ["One", "two.", "three!", "1.", "e.g.", "\n\n", "  ", "日本語。", "语", "สวัสดี", "e\u0301", MARK, "«ok.»"]
)
texts = st.one_of(
    st.lists(pieces, max_size=30).map(" ".join), st.lists(pieces, max_size=30).map("".join), st.text(max_size=60)
).map(str.strip)
limits = st.integers(1, 12)


@given(texts, limits)
def test_a_cut_text_is_a_prefix_within_the_limit(text: str, limit: int) -> None:
    cut = cut_text(text, limit)
    assert count_words(cut) <= limit
    if cut != text:
        assert count_words(text) > limit
        assert text.startswith(cut) or text.startswith(cut.removesuffix(MARK))
        # The mark belongs to the last word, so a text that it ends uses the whole limit; others use half of it.
        assert 2 * count_words(cut) >= limit
        assert cut.strip() == cut
    else:
        assert count_words(text) <= limit


@given(texts, limits)
def test_cutting_again_changes_nothing(text: str, limit: int) -> None:
    cut = cut_text(text, limit)
    assert cut_text(cut, limit) == cut
    assert cut_text(cut, limit + 1) == cut


@given(texts, limits)
def test_what_follows_the_limit_does_not_matter(text: str, limit: int) -> None:
    # The rule sees one word beyond the limit, to know whether a sentence continues.
    longer = f"{text} End"
    if count_words(text) > limit:
        assert cut_text(longer, limit) == cut_text(text, limit)


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("One two. Three four.", 4, "One two. Three four."),
        ("One two. Three four.", 3, "One two."),
        ("One two three four.", 3, "One two three…"),
        # A sentence end before half of the limit would leave too little.
        ("Yes. Two three four five six.", 5, "Yes. Two three four five…"),
        ("One two? «Three four!» Five six", 5, "One two? «Three four!»"),
        # Neither the number of a list item nor an abbreviation ends a sentence.
        ("Do this.\n\n1. Wash it.\n\n2. Dry it well.", 6, "Do this.\n\n1. Wash it."),
        ("Some bread, e.g. rye bread is good.", 4, "Some bread, e.g. rye…"),
        ("It is by J. Austen and others.", 4, "It is by J.…"),
        # Every letter of these is a word, and punctuation belongs to the letter before it.
        ("加水到这里。然后等一小时。", 7, "加水到这里。"),
        ("加水到这里,然后等一小时。", 7, "加水到这里,然后…"),
        ("水を入れて。待つ", 6, "水を入れて。"),
        ("สวัสดี", 2, "สวั…"),
        # Korean has spaces.
        ("물을 넣으세요. 기다리세요 한 시간.", 3, "물을 넣으세요."),
        # A mark is never separated from its letter.
        ("e\u0301 e\u0301 e\u0301", 2, "e\u0301 e\u0301…"),
    ],
)
def test_cuts_at_the_end_of_a_sentence_or_with_a_mark(text: str, limit: int, expected: str) -> None:
    assert cut_text(text, limit) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("one", 1),
        ("one - two", 3),
        ("用GPT-4回答", 4),
        ("物 理", 2),
        ("한국어 문장", 2),
        ("ພາສາ", 4),
        ("👩‍👩‍👧 ok", 2),
    ],
)
def test_counts_words_and_letters_of_scripts_without_spaces(text: str, words: int) -> None:
    assert count_words(text) == words


def one_user(*signals: Signal, tests: tuple[HeldOutPair, ...] = ()) -> Conversion:
    user = UserSignals(user_id="ann", signals=signals)
    return Conversion((PersonalizationExample(user=user, tests=tests, facts={"dataset": "own"}),), ())


def test_cuts_the_answers_of_signals_and_pairs_and_nothing_else() -> None:
    long, short = "One two. Three four.", "One two."
    turns = (Turn(speaker=Speaker.ASSISTANT, text=long), Turn(speaker=Speaker.USER, text=long))
    signals = (
        PreferencePair(prompt=long, chosen=long, rejected="No."),
        Rating(prompt=long, response=long, score=2),
        Edit(prompt=long, original=long, edited="No."),
        Comment(text=long, about=long),
        Comment(text=long, prompt=long),
        Statement(text=long),
        Conversation(turns=turns),
    )
    pair = HeldOutPair(prompt="another", chosen="No.", rejected="Five six. Seven eight.")
    cutter = AnswerCutter(3)
    made = cutter.cut(one_user(*signals, tests=(pair,)))
    assert made.dropped == ()
    [example] = made.examples
    assert example.user.signals == (
        PreferencePair(prompt=long, chosen=short, rejected="No."),
        Rating(prompt=long, response=short, score=2),
        Edit(prompt=long, original=short, edited="No."),
        Comment(text=long, about=short),
        *signals[4:],
    )
    assert example.tests == (HeldOutPair(prompt="another", chosen="No.", rejected="Five six."),)
    assert example.facts == {"dataset": "own", "max_words": 3, "cut_answers": 5}
    of_each_pair = {"max_words": 3, "answers": 2, "cut": 1, "marked": 0, "words_before": 2.5, "words_after": 1.5}
    assert cutter.summary() == [
        {"side": "chosen", **of_each_pair},
        {"side": "rejected", **of_each_pair},
        # One rating of four words, an edit of four and one, a comment about four.
        {
            "side": "other",
            "max_words": 3,
            "answers": 4,
            "cut": 3,
            "marked": 0,
            "words_before": 3.25,
            "words_after": 1.75,
        },
    ]


def test_an_id_that_was_given_stays_and_a_derived_one_follows_the_content() -> None:
    given_id = Rating(id="r1", prompt="p", response="One two three", score=2)
    derived = Rating(prompt="p", response="One two three", score=2)
    made = AnswerCutter(2).cut(one_user(given_id, derived)).examples[0].user.signals
    assert made == (
        Rating(id="r1", prompt="p", response="One two…", score=2),
        Rating(prompt="p", response="One two…", score=2),
    )


def test_what_is_the_same_after_cutting_is_dropped() -> None:
    same = {"chosen": "One two three", "rejected": "One two four"}
    signals = (
        PreferencePair(prompt="p", **same),
        Edit(prompt="p", original="One two three", edited="One two four"),
        Rating(prompt="q", response="One two three", score=2),
        Rating(prompt="q", response="One two four", score=2),
    )
    tests = (
        HeldOutPair(prompt="s", **same),
        HeldOutPair(prompt="q", chosen="One two five", rejected="No."),
        HeldOutPair(prompt="r", chosen="One two three", rejected="No."),
        HeldOutPair(prompt="r", chosen="One two four", rejected="No."),
    )
    conversion = one_user(*signals, tests=tests)
    assert not find_unusable(conversion.examples[0].user, tests)
    made = AnswerCutter(2).cut(conversion, "own.csv")
    assert [(item.place, item.reason) for item in made.dropped] == [
        ("own.csv, user ann, signals.0", "both responses are the same text after cutting"),
        ("own.csv, user ann, signals.1", "both responses are the same text after cutting"),
        ("own.csv, user ann, signals.3", "repeats an earlier signal after cutting"),
        ("own.csv, user ann, tests.0", "both responses are the same text after cutting"),
        (
            "own.csv, user ann, tests.1",
            "a signal of the kind rating has the prompt and a response of this pair, after cutting",
        ),
        ("own.csv, user ann, tests.3", "repeats an earlier held-out pair, after cutting"),
    ]
    [example] = made.examples
    assert [signal.kind for signal in example.user.signals] == ["rating"]
    assert example.tests == (HeldOutPair(prompt="r", chosen="One two…", rejected="No."),)


@given(st.lists(strategies.examples, max_size=3), limits)
def test_any_example_is_cut_to_one_that_can_be_used(examples: list[PersonalizationExample], limit: int) -> None:
    made = AnswerCutter(limit).cut(Conversion(tuple(examples), ()))
    for before, example in zip(examples, made.examples, strict=True):
        assert PersonalizationExample.model_validate_json(example.model_dump_json()) == example
        assert not find_unusable(example.user, example.tests)
        assert example.user.user_id == before.user.user_id
        assert all(count_words(text) <= limit for pair in example.tests for text in (pair.chosen, pair.rejected))
    again = AnswerCutter(limit)
    twice = again.cut(Conversion(made.examples, ()))
    assert [example.user for example in twice.examples] == [example.user for example in made.examples]
    assert all(lengths.cut == 0 for lengths in again.lengths.values())


@given(st.lists(strategies.pairs, min_size=1, max_size=4), limits)
def test_the_rule_does_not_know_the_sides(pairs: list[HeldOutPair], limit: int) -> None:
    swapped = [HeldOutPair(prompt=pair.prompt, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    cutters = AnswerCutter(limit), AnswerCutter(limit)
    (first, second) = (
        cutter.cut(one_user(tests=tuple(tests))).examples[0].tests
        for cutter, tests in zip(cutters, (pairs, swapped), strict=True)
    )
    assert [(pair.chosen, pair.rejected) for pair in first] == [(pair.rejected, pair.chosen) for pair in second]
    assert cutters[0].lengths["chosen"] == cutters[1].lengths["rejected"]


def test_a_limit_of_no_words_is_refused() -> None:
    with pytest.raises(InputError, match="field max_words: must be positive, got 0"):
        AnswerCutter(0)
