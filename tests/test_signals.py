from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from popi.errors import InputError
from popi.io import as_line
from popi.signals import Comment, Conversation, Signal, Speaker, Statement, Turn, UserSignals
from tests.strategies import signals, users

SIGNALS: TypeAdapter[Signal] = TypeAdapter(Signal)


@given(users())
def test_json_and_back_is_the_same(user: UserSignals) -> None:
    line = as_line(user)
    assert line.endswith("\n") and "\n" not in line[:-1]
    again = UserSignals.model_validate(json.loads(line))
    assert again == user
    assert again.digest() == user.digest()


@given(users())
def test_the_digest_is_sensitive_to_order(user: UserSignals) -> None:
    backwards = UserSignals(user_id=user.user_id, signals=user.signals[::-1])
    assert (backwards.digest() == user.digest()) == (len(user.signals) < 2)


@given(users(), st.data())
def test_the_digest_is_sensitive_to_content(user: UserSignals, data: st.DataObject) -> None:
    more = user.add(Statement(text="one thing more", origin="a test"))
    assert more.digest() != user.digest()
    place = data.draw(st.integers(0, len(more.signals) - 1))
    changed = more.signals[place].model_copy(update={"origin": more.signals[place].origin + "!"})
    others = UserSignals(user_id=user.user_id, signals=(*more.signals[:place], changed, *more.signals[place + 1 :]))
    assert others.digest() != more.digest()


@given(users())
def test_the_digest_does_not_name_the_user(user: UserSignals) -> None:
    assert UserSignals(user_id=user.user_id + "x", signals=user.signals).digest() == user.digest()


@given(signals)
def test_the_id_is_made_from_the_content(signal: Signal) -> None:
    content = signal.model_dump(mode="json", exclude={"id"})
    assert SIGNALS.validate_python(content).id == signal.id
    assert SIGNALS.validate_python({**content, "origin": signal.origin + "x"}).id != signal.id
    assert SIGNALS.validate_python({**content, "id": "mine"}).id == "mine"


@given(users(), st.lists(signals, max_size=4))
def test_adding_keeps_what_is_there_and_repeats_nothing(user: UserSignals, new: list[Signal]) -> None:
    more = user.add(*new, *new)
    assert more.signals[: len(user.signals)] == user.signals
    ids = [signal.id for signal in more.signals]
    assert len(ids) == len(set(ids))
    assert set(ids) == {signal.id for signal in (*user.signals, *new)}
    assert more.add(*new) == more


def test_adding_another_signal_under_a_known_id_is_refused() -> None:
    user = UserSignals(user_id="ada", signals=(Statement(id="s", text="I like lists"),))
    with pytest.raises(InputError, match="user 'ada' has another signal of the id 's'; give the new one its own"):
        user.add(Statement(id="s", text="I hate lists"))


def test_only_the_users_own_acts_and_words_are_evidence() -> None:
    said, answered = (Turn(speaker=who, text="hello") for who in (Speaker.USER, Speaker.ASSISTANT))
    assert Statement(text="x").is_evidence
    assert not Statement(text="x", said_by=Speaker.QUOTED).is_evidence
    assert not Comment(text="x", said_by=Speaker.ASSISTANT).is_evidence
    assert Conversation(turns=(answered, said)).is_evidence
    assert not Conversation(turns=(answered,)).is_evidence
    assert not Conversation(turns=(said,), said_by=Speaker.QUOTED).is_evidence


PAIR = {"kind": "pair", "prompt": "p", "chosen": "a", "rejected": "b"}
RATING = {"kind": "rating", "prompt": "p", "response": "r", "score": 3}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (PAIR | {"rejected": " a "}, "the same text"),
        (PAIR | {"prompt": " "}, "at least 1 character"),
        (PAIR | {"mood": "good"}, "not permitted"),
        (PAIR | {"chosen": "\ud800"}, "valid string"),
        (PAIR | {"said_by": "nobody"}, "'user', 'assistant' or 'quoted'"),
        (PAIR | {"time": "noon"}, "valid datetime"),
        ({"kind": "edit", "prompt": "p", "original": "a", "edited": "a"}, "nothing was changed"),
        (RATING | {"score": 6}, "score 6 lies outside the scale 1 to 5"),
        (RATING | {"score": float("nan")}, "finite number"),
        (RATING | {"best": float("inf")}, "finite number"),
        (RATING | {"worst": 3, "best": 3}, "one point"),
        ({"kind": "demographics", "facts": {}}, "at least 1 item"),
        ({"kind": "demographics", "facts": {"job": ""}}, "at least 1 character"),
        ({"kind": "conversation", "turns": []}, "at least 1 item"),
        ({"kind": "shrug"}, "does not match any of the expected tags"),
        ({"text": "x"}, "Unable to extract tag"),
    ],
)
def test_refuses_what_is_no_signal(record: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SIGNALS.validate_python(record)


def test_a_scale_may_run_downward() -> None:
    assert SIGNALS.validate_python(RATING | {"worst": 6, "best": 1}).is_evidence


def test_refuses_two_signals_of_one_id() -> None:
    with pytest.raises(ValidationError, match="signals 0 and 2 have the same id"):
        UserSignals(user_id="ada", signals=(Statement(text="x"), Statement(text="y"), Statement(text="x")))


def test_is_immutable() -> None:
    statement = Statement(text="x")
    with pytest.raises(ValidationError, match="frozen"):
        statement.text = "y"  # type: ignore[misc]
