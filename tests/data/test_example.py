from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from popi.data.example import HeldOutPair, PersonalizationExample, check_held_out, find_unusable
from popi.errors import InputError
from popi.signals import Comment, Conversation, Edit, PreferencePair, Rating, Signal, Speaker, Statement, Turn
from popi.signals import UserSignals as User
from tests.strategies import examples, users, words

PAIR = HeldOutPair(prompt="How?", chosen="Like this.", rejected="Like  that.")
OTHER = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(speaker=(Speaker.USER, Speaker.ASSISTANT)[n % 2], text=text) for n, text in enumerate(texts))


REVEALING: Sequence[Signal] = (
    PreferencePair(**PAIR.model_dump()),
    PreferencePair(prompt="How?", chosen="Like that.", rejected="Like this."),
    PreferencePair(prompt=" How? ", chosen="Like\nthis.", rejected="Something else."),
    Rating(prompt="How?", response="Like this.", score=5),
    Rating(prompt="How?", response="Like that.", score=1),
    Edit(prompt="How?", original="Like that.", edited="Like this."),
    Edit(prompt="How?", original="Anything.", edited="Like this."),
    Comment(text="Great!", about="Like this.", prompt="How?"),
    Comment(text="Great!", about="Like this."),
    Rating(prompt="HOW?", response="LIKE THIS.", score=5),
    Rating(prompt="How\uff1f", response="Li\u212ae this.", score=5),
    Conversation(turns=turns("How?", "Like this.", "Great!")),
    Conversation(turns=turns("Hello", "Hello!", "How?", "Like that.")),
)

HARMLESS: Sequence[Signal] = (
    PreferencePair(prompt="How?", chosen="By hand.", rejected="By foot."),
    PreferencePair(prompt="Why?", chosen="Like this.", rejected="Like that."),
    Rating(prompt="Why?", response="Like this.", score=5),
    Rating(prompt="How?", response="like this", score=5),
    Comment(text="Like this.", about="Something.", prompt="How?"),
    Comment(text="Great!", about="Like this.", prompt="Why?"),
    Statement(text="How? Like this."),
    Conversation(turns=turns("How?", "By hand.", "Like this.")),
)


@pytest.mark.parametrize("signal", REVEALING, ids=lambda signal: signal.id)
def test_a_pair_that_the_signals_reveal_is_unusable(signal: Signal) -> None:
    user = User(user_id="ann", signals=(Statement(text="Hi"), signal))
    other = HeldOutPair(**OTHER)
    assert find_unusable(user, (other, PAIR)) == {
        1: f"a signal of the kind {signal.kind} has the prompt and a response of this pair"
    }
    example = PersonalizationExample(user=user, tests=(other, PAIR))
    with pytest.raises(
        InputError, match=r"prompt 'How\?'; 1 of 2 held-out pairs of user 'ann' .* remove them"
    ) as caught:
        check_held_out(example)
    assert caught.value.field == "tests.1"


@pytest.mark.parametrize("signal", HARMLESS, ids=lambda signal: signal.id)
def test_a_pair_that_only_resembles_a_signal_is_usable(signal: Signal) -> None:
    check_held_out(PersonalizationExample(user=User(user_id="ann", signals=(signal,)), tests=(PAIR,)))


@pytest.mark.parametrize("swap", [False, True])
def test_a_pair_that_repeats_another_is_unusable(swap: bool) -> None:
    again = {"prompt": "How? ", "chosen": PAIR.rejected, "rejected": PAIR.chosen} if swap else PAIR.model_dump()
    same_prompt = HeldOutPair(**OTHER | {"prompt": "How?"})
    assert find_unusable(User(user_id="ann"), (PAIR, same_prompt, HeldOutPair(**again))) == {
        2: "repeats an earlier held-out pair"
    }


@given(users(max_size=4), st.data())
def test_every_pair_made_of_a_signal_is_found(user: User, data: st.DataObject) -> None:
    pairs = [signal for signal in user.signals if isinstance(signal, PreferencePair)]
    tests = [HeldOutPair(prompt=one.prompt, chosen=one.rejected, rejected=one.chosen) for one in pairs]
    assert list(find_unusable(user, tests)) == list(range(len(tests)))


@pytest.mark.parametrize(
    ("cluster", "name"), [(None, "ann"), ("a", "a"), (7, "7"), (7.0, "7"), ("7", "7"), (0.5, "0.5"), (True, "True")]
)
def test_the_cluster_is_the_users_own_unless_it_is_given(cluster: object, name: str) -> None:
    assert PersonalizationExample(user=User(user_id="ann"), facts={"cluster": cluster}).cluster == name
    assert PersonalizationExample(user=User(user_id="ann")).cluster == "ann"


NOTHING: Any = {"tests": None, "oracles": None, "facts": None}


def test_null_is_not_given() -> None:
    bare = {"user": {"user_id": "ann", "signals": None}}
    assert PersonalizationExample.model_validate(bare | NOTHING) == PersonalizationExample(user=User(user_id="ann"))
    some = PersonalizationExample.model_validate(bare | {"oracles": {"truth": None, "evidence": "- lists"}})
    assert some.oracles == {"evidence": "- lists"}
    with pytest.raises(ValidationError, match=r"tests\.0\.rejected\n.*Field required"):
        PersonalizationExample.model_validate(bare | {"tests": [OTHER | {"rejected": None}]})


@pytest.mark.parametrize("fact", [np.float32(1), float("nan"), {1, 2}])
def test_refuses_facts_that_no_file_can_hold(fact: object) -> None:
    with pytest.raises(ValidationError, match="cannot be written as JSON"):
        PersonalizationExample(user=User(user_id="ada"), facts={"x": fact})


@given(examples, words)
def test_json_and_back_is_the_same(example: PersonalizationExample, cluster: str) -> None:
    example = example.model_copy(update={"facts": example.facts | {"cluster": cluster}})
    assert PersonalizationExample.model_validate_json(example.model_dump_json()) == example
