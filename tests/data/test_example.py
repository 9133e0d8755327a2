from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from popi.data.example import HeldOutPair, PersonalizationExample, read_examples
from popi.errors import InputError
from popi.io import write_jsonl
from popi.signals import UserSignals
from tests.strategies import users, words

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


@given(st.lists(examples, max_size=3, unique_by=lambda example: example.user.user_id))
def test_lines_out_and_in_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, written: list[PersonalizationExample]
) -> None:
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    write_jsonl(path, written)
    assert list(read_examples(path)) == written


@given(st.lists(users(max_size=2), max_size=3, unique_by=lambda user: user.user_id))
def test_bare_signals_are_examples_without_tests(
    tmp_path_factory: pytest.TempPathFactory, written: list[UserSignals]
) -> None:
    path = tmp_path_factory.mktemp("users") / "users.jsonl"
    write_jsonl(path, written)
    assert list(read_examples(path)) == [PersonalizationExample(user=user) for user in written]


def _write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


ADA: dict[str, Any] = {"user": {"user_id": "ada"}}


@pytest.mark.parametrize(
    ("record", "line", "field", "says"),
    [
        ({"user_id": " ada "}, 2, "user_id", "user 'ada' stands in line 1 already; join the two lines"),
        ({"user": {"user_id": ""}}, 2, "user.user_id", "at least 1 character"),
        ({"user": {"user_id": "b"}, "tests": [{"prompt": "p", "chosen": "a"}]}, 2, "tests.0.rejected", "required"),
        (
            {"user": {"user_id": "b"}, "tests": [{"prompt": "p", "chosen": "a", "rejected": "a "}]},
            2,
            "tests.0",
            "the same text",
        ),
        ({"user": {"user_id": "b"}, "facts": {"x": "\ud800"}}, 2, "facts", "cannot be written as JSON"),
        ({"user": {"user_id": "b"}, "oracles": {"truth": "\ud800"}}, 2, "oracles.truth", "valid string"),
        ("ada", 2, None, "is not a JSON object"),
    ],
)
def test_a_broken_line_is_named_with_its_field(
    tmp_path: Path, record: Any, line: int, field: str | None, says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        list(read_examples(_write(tmp_path / "users.jsonl", ADA, record)))
    assert (caught.value.file, caught.value.line, caught.value.field) == (tmp_path / "users.jsonl", line, field)


def test_reads_one_line_at_a_time(tmp_path: Path) -> None:
    reading = read_examples(_write(tmp_path / "users.jsonl", ADA, "broken"))
    assert next(reading).user.user_id == "ada"
    with pytest.raises(InputError, match=":2"):
        next(reading)


@pytest.mark.parametrize("fact", [np.float32(1), float("nan"), {1, 2}])
def test_refuses_facts_that_no_file_can_hold(fact: object) -> None:
    with pytest.raises(ValidationError, match="cannot be written as JSON"):
        PersonalizationExample(user=UserSignals(user_id="ada"), facts={"x": fact})
