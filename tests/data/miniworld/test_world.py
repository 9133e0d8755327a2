import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popi.claims import parse_claims
from popi.data.miniworld import SPLITS, as_vector, claimed_tastes, draw_user, generate, style_of, utility
from popi.data.miniworld.curriculum import lesson
from popi.data.miniworld.language import all_prompts, draw_question
from popi.data.miniworld.observe import MIX, draw_observation
from popi.data.miniworld.tastes import NOISE, draw_taste
from popi.data.miniworld.topics import HELD_OUT_TOPICS, TOPICS
from popi.data.miniworld.world import is_held_out
from popi.errors import InputError


def some(split, users=40, **options):
    return list(generate(split=split, users=users, seed=5, **options))


def test_a_user_depends_on_seed_and_place_alone():
    many, few = some("train", 12), some("train", 5)
    assert many[:5] == few
    assert many[0] != many[1]
    assert next(generate(split="train", users=1, seed=6)) != many[0]


def test_every_kind_of_signal_occurs():
    seen = [signal for example in some("train", 60) for signal in example.user.signals]
    kinds = {signal.kind for signal in seen}
    assert kinds == {"pair", "edit", "comment", "conversation", "rating", "statement", "demographics"}
    assert any(not signal.is_evidence for signal in seen)


def test_signals_and_tests_are_as_many_as_asked():
    for example in some("validation", 10, signals=11, tests=3):
        assert len(example.user.signals) == 11
        assert len(example.tests) == 3
        assert len(example.facts["perfect_choice"]) == 3


def test_combinations_of_tastes_are_held_out():
    for split in SPLITS:
        held = [is_held_out(as_vector(example.facts["tastes"])) for example in some(split, 30, signals=0)]
        assert all(held) if split == "unseen-combinations" else not any(held)


def prompts_in(signals):
    return {signal.prompt for signal in signals if hasattr(signal, "prompt")} | {
        signal.turns[0].text for signal in signals if signal.kind == "conversation"
    }


def test_prompts_are_held_out():
    trained = {
        prompt
        for example in some("train", 100)
        for prompt in {test.prompt for test in example.tests} | prompts_in(example.user.signals)
    }
    for split in SPLITS[1:]:
        assert not trained & {test.prompt for example in some(split, 60, signals=0) for test in example.tests}


@pytest.mark.parametrize("split", SPLITS)
def test_the_tests_of_a_user_ask_what_their_signals_do_not_show(split):
    for example in some(split, 20, signals=40, tests=40):
        assert not prompts_in(example.user.signals) & {test.prompt for test in example.tests}


def test_lessons_show_nothing_that_is_held_out():
    held_out = {
        test.prompt for split in SPLITS[1:] for example in some(split, 100, signals=0) for test in example.tests
    }
    for task in ("write", "raw", "summary", "bare"):
        for place in range(80):
            made = lesson(task, 1, place, signals=8)
            content = made.messages[-1].content
            assert not any(prompt in content for prompt in held_out)
            if task == "summary":
                assert not is_held_out(as_vector(claimed_tastes(content)))


def test_more_tests_than_a_split_has_prompts_are_bad_input():
    with pytest.raises(InputError, match=r"unseen-topics has \d+ prompts .* not 5000; use at most \d+"):
        draw_user("unseen-topics", 0, 0, tests=5000)


def test_topics_are_held_out():
    def mentions(prompt):
        return any(
            f" {topic}" in prompt and any(thing in prompt for thing in TOPICS[topic]) for topic in HELD_OUT_TOPICS
        )

    assert all(mentions(test.prompt) for example in some("unseen-topics") for test in example.tests)
    assert not any(mentions(test.prompt) for example in some("unseen-users") for test in example.tests)


def test_an_unknown_split_is_bad_input():
    with pytest.raises(InputError, match=r"unknown split 'test'.*use one of train"):
        draw_user("test", 0, 0)


def test_the_answers_of_a_pair_share_a_question_and_differ_in_one_or_two_dimensions():
    for example in some("unseen-users", 60):
        for test in example.tests:
            chosen, rejected = style_of(test.chosen), style_of(test.rejected)
            assert 1 <= sum(chosen[name] != rejected[name] for name in chosen) <= 2


def test_choices_follow_the_utility_with_the_known_noise():
    met = [
        (
            utility(example.facts["tastes"], style_of(test.chosen))
            > utility(example.facts["tastes"], style_of(test.rejected))
        )
        for example in some("validation", 800, signals=0)
        for test in example.tests
    ]
    assert np.mean(met) == pytest.approx(1 - NOISE, abs=4 * np.sqrt(NOISE * (1 - NOISE) / len(met)))


def test_a_perfect_choice_is_one_that_the_utility_makes():
    for example in some("validation", 60):
        for test, perfect in zip(example.tests, example.facts["perfect_choice"], strict=True):
            tastes = example.facts["tastes"]
            assert (utility(tastes, style_of(test.chosen)) > utility(tastes, style_of(test.rejected))) == (perfect == 1)


def test_the_oracles_say_the_tastes():
    for example in some("unseen-combinations"):
        assert claimed_tastes(example.oracles["truth"]) == example.facts["tastes"]
        assert claimed_tastes(example.oracles["evidence"]) == example.facts["evidence_tastes"]


def test_the_evidence_oracle_lies_between_nothing_and_the_truth():
    def accuracy(name):
        return np.mean(
            [
                (np.sign(utility(claims, style_of(test.chosen)) - utility(claims, style_of(test.rejected))) + 1) / 2
                for example in examples
                for claims in [claimed_tastes(example.oracles[name])]
                for test in example.tests
            ]
        )

    examples = some("unseen-combinations", 120)
    assert 0.8 < accuracy("evidence") < accuracy("truth")


def test_oracle_summaries_parse_as_claims():
    for example in some("train", 10):
        assert [claim.text for claim in parse_claims(example.oracles["truth"])]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(MIX)))
def test_what_a_signal_shows_is_possible_for_its_user(seed, kind):
    rng = np.random.default_rng(seed)
    taste = draw_taste(rng)
    seen = draw_observation(rng, taste, draw_question(rng, list(TOPICS)), kind)
    from popi.data.miniworld.tastes import hypotheses

    mine = int(np.flatnonzero((hypotheses() == taste).all(axis=1))[0])
    assert np.isfinite(seen.log_likelihood[mine])
    for text, style in seen.answers:
        assert (as_vector(style_of(text)) == style).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(TOPICS)))
def test_all_prompts_hold_what_is_drawn(seed, topic):
    assert draw_question(np.random.default_rng(seed), [topic]).text in set(all_prompts([topic]))
