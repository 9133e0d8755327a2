from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from popi.errors import InputError
from popi.io import as_line, validate
from popi.signals import Comment, Conversation, Signal, Speaker, Statement, Turn, UserSignals, as_user_id
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
    with pytest.raises(InputError, match="user 'ada' already has a different signal with the id 's'; give"):
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
        (PAIR | {"time": "noon"}, "'noon' is not a time; write times in ISO 8601"),
        ({"kind": "edit", "prompt": "p", "original": "a", "edited": "a"}, "the same text"),
        (RATING | {"score": float("inf")}, "finite number"),
        (RATING | {"score": float("nan")}, "Field required"),
        (RATING | {"score": True}, "should be a number, not true"),
        (RATING | {"best": float("inf")}, "finite number"),
        (RATING | {"worst": 3, "best": 3}, "worst and best are both 3"),
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


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ({"score": 6}, "score 6 is outside the default scale 1 to 5; give best, and worst if it is not 1, in every"),
        ({"score": 0}, "score 0 is outside the default scale"),
        ({"score": 5.01}, r"score 5\.01 is outside the default scale"),
        ({"score": 6, "best": None, "worst": float("nan")}, "score 6 is outside the default scale"),
        ({"score": 4, "worst": 0}, "worst is 0, but best is not given"),
        ({"score": 4, "worst": 6}, "worst is 6, but best is not given"),
        ({"score": 1, "best": 1}, "best is 1, but worst is not given"),
        ({"score": 0, "best": -1}, "best is -1, but worst is not given"),
        ({"score": 11, "best": 10}, "score 11 is outside the scale 1 to 10"),
        ({"score": 0, "best": 10}, "score 0 is outside the scale 1 to 10"),
        ({"score": 1, "worst": 2, "best": 2}, "worst and best are both 2"),
    ],
)
def test_a_scale_other_than_1_to_5_is_required_to_be_given(scale: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SIGNALS.validate_python(RATING | scale)


@pytest.mark.parametrize(
    "scale",
    [
        {"score": 1},
        {"score": 4.5},
        {"score": "5"},
        {"score": 4, "worst": 1},
        {"score": 8, "best": 10},
        {"score": 0, "worst": 0, "best": 10},
        {"score": 2, "worst": 6, "best": 1},
        {"score": 1, "worst": 0, "best": 1},
    ],
)
def test_a_rating_keeps_its_scale_in_a_file(scale: dict[str, Any]) -> None:
    rating = SIGNALS.validate_python(RATING | scale)
    assert SIGNALS.validate_json(rating.model_dump_json()) == rating


NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("2024-05-01T12:00:00Z", 0),
        (" 2024-05-01 12:00 ", 0),
        ("20240501T120000", 0),
        ("2024-05-01T14:00:00+02:00", 0),
        ("2024-05-01T12:00:00.123456789", 0.123456),
        ("2024-05-01", -43200),
        (date(2024, 5, 1), -43200),
        (NOON.replace(tzinfo=None), 0),
        (NOON.astimezone(timezone(timedelta(hours=-7))), 0),
        (1714564800, 0),
        (1714564800.5, 0.5),
        ("1714564800", 0),
        (1714564800000, 0),
        ("1714564800500", 0.5),
        (np.int64(1714564800), 0),
    ],
)
def test_a_time_is_read_where_it_is_unambiguous_and_kept_in_utc(given: object, seconds: float) -> None:
    time = Statement.model_validate({"text": "x", "time": given}).time
    assert time == NOON + timedelta(seconds=seconds)
    assert time is not None and time.tzinfo is UTC


@pytest.mark.parametrize(
    "given",
    [
        *(45321, 45321.5, "45321", "45321.75"),  # days since 1900
        *(20240501, "20240501", 202405011200, 20240501120000, 2024),
        *(0, -1714564800, 17145648000000000, 10**400, 1e300, True),
    ],
)
def test_a_number_that_may_be_another_date_is_refused(given: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Statement.model_validate({"text": "x", "time": given})
    [error] = caught.value.errors()
    assert error["loc"] == ("time",)
    assert given is True or "is not a Unix time from 1990 to 2100 in seconds or milliseconds" in error["msg"]


@pytest.mark.parametrize("given", ["05/01/2024", "yesterday", "2024-13-01", "0001-01-01T00:00:00+05:00", "12:00"])
def test_a_text_that_is_not_a_time_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match=r"time\n"):
        Statement.model_validate({"text": "x", "time": given})


@pytest.mark.parametrize("given", ["", " ", "NaT", "NaN", "None", "null", "<NA>"])
def test_a_text_that_stands_for_no_time_is_no_time(given: str) -> None:
    assert Statement.model_validate({"text": "x", "time": given}) == Statement(text="x")


@pytest.mark.parametrize("field", ["text", "id", "origin", "said_by", "time"])
def test_half_a_character_is_refused_in_every_field(field: str) -> None:
    with pytest.raises(InputError, match=rf"field {field}: (contains a lone surrogate|.* is not a time)"):
        validate(Statement, {"text": "x", field: "\ud83d"})


def test_null_means_not_given() -> None:
    nothing = {"id": None, "time": float("nan"), "origin": None, "said_by": None, "about": None, "chosen": None}
    comment = SIGNALS.validate_python({"kind": "comment", "text": "x", "prompt": None, **nothing})
    assert comment == Comment(text="x")
    assert SIGNALS.validate_python(RATING | {"best": None}) == SIGNALS.validate_python(RATING)
    assert UserSignals.model_validate({"user_id": "ann", "signals": None}).signals == ()
    person = SIGNALS.validate_python({"kind": "demographics", "facts": {"age": 34.0, "town": None}})
    assert person.facts == {"age": "34"}  # type: ignore[union-attr]
    with pytest.raises(ValidationError, match=r"statement\.text\n.*Field required"):
        SIGNALS.validate_python({"kind": "statement", "text": None})
    with pytest.raises(ValidationError, match="at least 1 item"):
        SIGNALS.validate_python({"kind": "demographics", "facts": {"town": None}})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        *(("ann", "ann"), (" ann\n", "ann"), ("07", "07"), ("7.0", "7.0")),
        *(("cafe\u0301", "caf\u00e9"), ("\ufeffann\u200b", "ann"), ("a\u200db", "a\u200db")),
        *((7, "7"), (7.0, "7"), (-0.0, "0"), (2**70, str(2**70)), (np.int64(7), "7")),
    ],
)
def test_an_id_is_the_same_however_it_is_written(given: Any, text: str) -> None:
    assert as_user_id(given) == text
    user = UserSignals.model_validate({"user_id": given, "signals": [{"kind": "statement", "text": "x", "id": given}]})
    assert (user.user_id, user.signals[0].id) == (text, text)


@pytest.mark.parametrize("given", ["", "  ", True, False, 7.5, float(2**53), float("inf"), None, ["ann"], b"\xff"])
def test_what_is_not_an_id_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"field user_id: .*; give it as text"):
        as_user_id(given)
    with pytest.raises(ValidationError, match="user_id"):
        UserSignals.model_validate({"user_id": given})


times = st.datetimes(timezones=st.none() | st.timezones(), min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1))


@given(st.lists(times, max_size=6), st.booleans())
def test_signals_are_chronological_where_all_have_a_time(times: list[datetime], unknown: bool) -> None:
    signals = [Statement(text=f"{place}", time=time) for place, time in enumerate(times)]
    if unknown:
        signals.insert(len(signals) // 2, Statement(text="when?"))
    user = UserSignals(user_id="ann", signals=tuple(signals))
    ordered = user.chronological()
    if unknown:
        assert ordered == user.signals
    else:
        expected = [place for _, place in sorted((signal.time, place) for place, signal in enumerate(signals))]
        assert [int(signal.text) for signal in ordered] == expected


def test_refuses_two_signals_of_one_id() -> None:
    with pytest.raises(ValidationError, match="signals 0 and 2 have the same id"):
        UserSignals(user_id="ada", signals=(Statement(text="x"), Statement(text="y"), Statement(text="x")))


def test_is_immutable() -> None:
    statement = Statement(text="x")
    with pytest.raises(ValidationError, match="frozen"):
        statement.text = "y"  # type: ignore[misc]
