from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.data.dataset import save
from popi.data.example import PersonalizationExample, find_unusable
from popi.data.reading import read_examples, read_users
from popi.errors import InputError
from popi.io import BadRows, write_jsonl
from popi.signals import Demographics, Rating, UserSignals
from tests.strategies import examples, users

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
LEAK = {"user": {"user_id": "lee", "signals": [{"kind": "pair", **PAIR}]}, "tests": [PAIR]}
ADA: dict[str, Any] = {"user": {"user_id": "ada"}}


def write(path: Path, *records: Any) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    return tmp_path / "users.jsonl"


@given(st.lists(examples, max_size=3, unique_by=lambda example: example.user.user_id))
def test_lines_out_and_in_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, written: list[PersonalizationExample]
) -> None:
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    write_jsonl(path, written)
    assert list(read_users(path)) == [example.user for example in written]
    leaks = [example for example in written if find_unusable(example.user, example.tests)]
    if leaks:
        with pytest.raises(InputError, match=f"{len(leaks)} bad rows" if len(leaks) > 1 else "cannot be used"):
            list(read_examples(path))
    else:
        assert list(read_examples(path)) == written


@given(st.lists(users(max_size=2), max_size=3, unique_by=lambda user: user.user_id))
def test_bare_signals_are_examples_without_tests(
    tmp_path_factory: pytest.TempPathFactory, written: list[UserSignals]
) -> None:
    path = tmp_path_factory.mktemp("users") / "users.jsonl"
    write_jsonl(path, written)
    assert list(read_examples(path)) == [PersonalizationExample(user=user) for user in written]


@pytest.mark.parametrize(
    ("record", "field", "says"),
    [
        ({"user_id": " ada "}, "user_id", "user 'ada' is already in line 1; join the two lines"),
        ({"user": {"user_id": ""}}, "user.user_id", "at least 1 character"),
        ({"user": {"user_id": None}}, "user.user_id", "field required"),
        ({"user": {"user_id": True}}, "user.user_id", "valid string"),
        ({"user": {"user_id": 7.5}}, "user.user_id", "valid string"),
        ({"user": {"user_id": "b"}, "tests": [{"prompt": "p", "chosen": "a"}]}, "tests.0.rejected", "required"),
        ({"user": {"user_id": "b"}, "tests": [PAIR | {"rejected": "a "}]}, "tests.0", "the same text"),
        ({"user": {"user_id": "b"}, "tests": [PAIR, PAIR]}, "tests.1", "repeats an earlier held-out pair"),
        (
            LEAK,
            "tests.0",
            "has the prompt and a response of this pair; prompt 'p'; 1 of 1 held-out pairs of user 'lee'",
        ),
        ({"user": {"user_id": "b"}, "facts": {"x": "\ud800"}}, "facts", "cannot be written as JSON"),
        ({"user": {"user_id": "b"}, "oracles": {"truth": "\ud800"}}, "oracles.truth", "lone surrogate"),
        ({"messages": [], "user": "b"}, None, r"is a chat log; .* popi data convert chat users\.jsonl"),
        ("ada", None, "is not JSON"),
        ('"ada"', None, "is not a JSON object"),
        (["ada"], None, "is not a JSON object"),
    ],
)
def test_a_broken_line_is_named_with_its_field(users_file: Path, record: Any, field: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        list(read_examples(write(users_file, ADA, record)))
    assert (caught.value.file, caught.value.line, caught.value.field) == (users_file, 2, field)


def test_reads_one_line_at_a_time(users_file: Path) -> None:
    reading = read_examples(write(users_file, ADA, "broken"))
    assert next(reading).user.user_id == "ada"
    with pytest.raises(InputError, match=":2"):
        next(reading)


def test_a_user_is_the_same_however_the_id_is_written(users_file: Path) -> None:
    for first, second in (
        (7, "7"),
        (7.0, " 7"),
        ("ann ", "ann"),
        (12345678901234567890, "12345678901234567890"),
        ("caf\u00e9", "cafe\u0301"),
        ("\ufeffann", "ann"),
    ):
        with pytest.raises(InputError, match="is already in line 1"):
            list(read_users(write(users_file, {"user_id": first}, {"user_id": second})))
    ids = ["7.5", "07", "7.0", "Ann", "ann"]
    assert [user.user_id for user in read_users(write(users_file, *({"user_id": name} for name in ids)))] == ids


def test_the_first_ten_bad_rows_are_reported_and_all_are_counted(users_file: Path) -> None:
    write(users_file, ADA, *[{"user_id": ""}] * 12, "{half", {"user_id": "bob"})
    with pytest.raises(InputError) as caught:
        list(read_examples(users_file))
    assert str(caught.value) == (
        f"{users_file}: 13 bad rows; the first: line 2, field user_id: string should have at least 1 character; "
        "fix them, or continue without them with --skip-bad-rows"
    )
    notes = caught.value.__notes__
    assert [note.split(": ")[0] for note in notes[:9]] == [f"{users_file}:{n}, field user_id" for n in range(3, 12)]
    assert notes[9:] == ["... and 3 more"]


def test_bad_rows_are_skipped_and_counted(users_file: Path) -> None:
    write(users_file, {"user_id": ""}, ADA, "{half", LEAK, ADA, {"user_id": "bob"})
    bad = BadRows(skip=True)
    assert [example.user.user_id for example in read_examples(users_file, bad_rows=bad)] == ["ada", "bob"]
    assert bad.count == 4
    assert bad.summary().startswith(f"skipped 4 bad rows; the first: {users_file}:1, field user_id: string should")
    assert [user.user_id for user in read_users(users_file, bad_rows=BadRows(skip=True))] == ["ada", "lee", "bob"]


def test_a_file_without_a_good_row_is_an_error_also_when_bad_rows_are_skipped(users_file: Path) -> None:
    with pytest.raises(InputError, match=r"2 bad rows; the first: line 1: .*; all rows are bad"):
        list(read_examples(write(users_file, "{half", "[1"), bad_rows=BadRows(skip=True)))
    assert list(read_examples(write(users_file))) == []


def test_a_rating_that_shows_another_scale_is_not_skipped(users_file: Path) -> None:
    def rated(user_id: str, score: float, **scale: float) -> dict[str, Any]:
        rating = {"kind": "rating", "prompt": "p", "response": "r", "score": score, **scale}
        return {"user_id": user_id, "signals": [rating]}

    write(users_file, rated("ann", 4), rated("bob", 8))
    for bad in (None, BadRows(skip=True)):
        with pytest.raises(
            InputError, match=r":2, field signals\.0: score 8 is outside the default scale 1 to 5; give"
        ):
            list(read_examples(users_file, bad_rows=bad))
    write(users_file, rated("ann", 4, best=10), rated("bob", 8, best=10))
    assert [user.signals[0].best for user in read_users(users_file)] == [10, 10]  # type: ignore[union-attr]


def test_a_table_and_a_folder_without_users_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a table; convert it first: popi data convert csv users\.csv"):
        list(read_examples(write(tmp_path / "users.csv", "user_id,text")))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_examples(tmp_path / "absent.csv"))
    with pytest.raises(InputError, match="is not a data set on disk"):
        list(read_examples(tmp_path))


def test_a_data_set_is_checked_like_lines(tmp_path: Path) -> None:
    made = [PersonalizationExample.model_validate(record) for record in (ADA, LEAK, ADA)]
    save(made, tmp_path / "users")
    with pytest.raises(InputError, match=r"users: 2 bad rows; the first: line 2, field tests\.0"):
        list(read_examples(tmp_path / "users"))
    assert len(list(read_examples(tmp_path / "users", bad_rows=BadRows(skip=True)))) == 1


def test_what_pandas_writes_is_read(users_file: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(
        {
            "kind": ["rating", "demographics"],
            "prompt": ["p", None],
            "response": ["r", None],
            "score": [4.0, float("nan")],
            "best": [float("nan"), float("nan")],
            "id": [1, 2],
            "time": pandas.to_datetime(["2024-05-01", None]),
            "facts": [None, {"age": 34, "town": None}],
        }
    )
    rows = table.to_dict(orient="records")
    by_json = json.loads(table.to_json(orient="records", date_format="iso"))
    as_epoch = json.loads(table.assign(time=[1714521600000, None]).to_json(orient="records"))
    write(users_file, *({"user_id": n, "signals": signals} for n, signals in enumerate((by_json, as_epoch))))
    users_file.write_text(users_file.read_text().replace("null", "NaN", 3))
    read = [*read_users(users_file), UserSignals.model_validate({"user_id": 2, "signals": rows})]
    assert [user.user_id for user in read] == ["0", "1", "2"]
    for user in read:
        rating, person = user.signals
        assert isinstance(rating, Rating) and isinstance(person, Demographics)
        assert (rating.id, rating.best, rating.score, str(rating.time)) == ("1", 5, 4, "2024-05-01 00:00:00+00:00")
        assert (person.id, person.time, person.facts) == ("2", None, {"age": "34"})
