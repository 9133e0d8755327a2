import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.claims import as_text
from popi.data.miniworld import claimed_tastes, phrases, style_of, utility
from popi.data.miniworld.language import as_sides, as_vector, claims_for, draw_question, write_answer
from popi.data.miniworld.tastes import DIMENSIONS, SIDES
from popi.data.miniworld.topics import HELD_OUT_TOPICS, TOPICS
from popi.summary import Claim

styles = st.lists(st.sampled_from([-1, 1]), min_size=10, max_size=10).map(lambda sides: np.array(sides, np.int8))
vectors = st.lists(st.sampled_from([-1, 0, 1]), min_size=10, max_size=10).map(lambda sides: np.array(sides, np.int8))


def test_there_are_enough_topics_of_distinct_things():
    assert len(TOPICS) >= 60
    assert all(len(set(things)) == len(things) >= 4 for things in TOPICS.values())
    assert 10 <= len(HELD_OUT_TOPICS) < len(TOPICS) / 4


def test_no_thing_is_a_word_of_style():
    words = {
        word for table in (phrases.VERBS, phrases.UNITS, phrases.STANCES) for side in table.values() for word in side
    }
    things = {thing for names in TOPICS.values() for thing in names} | set(TOPICS)
    assert not {word.lower() for word in words} & things


@given(styles, st.integers(0, 2**32 - 1))
def test_the_style_of_a_written_answer_reads_back(style, seed):
    rng = np.random.default_rng(seed)
    answer = write_answer(rng, draw_question(rng, list(TOPICS)), style)
    assert style_of(answer) == as_sides(style)


@given(styles, st.integers(0, 2**32 - 1))
def test_two_answers_of_one_style_are_seldom_the_same_text(style, seed):
    rng = np.random.default_rng(seed)
    question = draw_question(rng, list(TOPICS))
    assert len({write_answer(rng, question, style) for _ in range(20)}) > 5


@given(st.text())
def test_any_text_has_a_style(text):
    for name, side in style_of(text).items():
        assert side in SIDES[name]


@pytest.mark.parametrize(
    ("text", "name", "side"),
    [
        ("Use the pan.", "length", "short"),
        ("Use the pan. Get the lid.", "length", "long"),
        ("Hello! Use the pan.", "length", "short"),
        ("Use the pan. For example, take the lid. Does that help?", "length", "short"),
        ("- Use the pan.\n- Get the lid.", "format", "bullets"),
        ("Use the well-known pan.", "format", "prose"),
        ("Utilise the pan.", "level", "technical"),
        ("Use the pan \U0001f680.", "emoji", "emoji"),
        ("Does that help", "closing", "stop"),
        ("Use it?", "closing", "question"),
        ("Hi there! Use it.", "opening", "greeting"),
        ("Use it. Hi there!", "opening", "direct"),
    ],
)
def test_styles_worked_out_by_hand(text, name, side):
    assert style_of(text)[name] == side


def test_a_dimension_without_any_mark_is_left_out():
    assert "units" not in style_of("Just use the pan.")
    assert "tone" not in style_of("Just use the pan. One should check it.")


def test_every_name_of_a_side_claims_that_side_alone():
    for (dimension, side), wording in phrases.WORDING.items():
        for name in wording.names:
            assert claimed_tastes(f"- {name.upper()}") == {dimension: side}


def test_vague_lines_claim_nothing():
    assert set(phrases.VAGUE) == set(DIMENSIONS)
    assert claimed_tastes("\n".join(phrases.VAGUE.values())) == {}


def test_a_contradiction_claims_nothing():
    assert claimed_tastes("- long answers\n- short answers\n- emoji") == {"emoji": "emoji"}


@given(vectors, st.integers(0, 2**32 - 1))
def test_claims_read_back(vector, seed):
    claims = claims_for(np.random.default_rng(seed), vector)
    assert (as_vector(claimed_tastes(as_text([Claim(text=text) for text in claims]))) == vector).all()


@given(vectors)
def test_named_sides_and_vectors_are_inverse(vector):
    assert (as_vector(as_sides(vector)) == vector).all()


def test_utility_counts_met_minus_missed():
    tastes = {"length": "short", "emoji": "emoji", "units": "metric"}
    assert utility(tastes, {"length": "short", "emoji": "plain"}) == 0
    assert utility(tastes, {"length": "short", "emoji": "emoji", "units": "imperial"}) == 1
