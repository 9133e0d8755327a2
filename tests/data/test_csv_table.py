from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from popi.data.csv_table import COLUMNS, DELIMITERS, convert_csv
from popi.data.example import PersonalizationExample
from popi.data.reading import read_examples
from popi.errors import InputError
from popi.io import BadRows, write_jsonl
from popi.signals import (
    MISSING,
    Comment,
    Conversation,
    Demographics,
    Edit,
    PreferencePair,
    Rating,
    Speaker,
    Statement,
    as_user_id,
)
from tests.strategies import signals, words

Write = Callable[..., Path]
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes rows under the columns that they have, with a delimiter."""

    def make(*rows: dict[str, Any], delimiter: str = ",", encoding: str = "utf-8") -> Path:
        path = tmp_path_factory.mktemp("csv") / "table.csv"
        with path.open("w", newline="", encoding=encoding) as stream:
            table = csv.DictWriter(
                stream, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter
            )
            table.writeheader()
            table.writerows(rows)
        return path

    return make


def signals_of(path: Path) -> list[Any]:
    return [signal for example in convert_csv(path).examples for signal in example.user.signals]


def test_a_wide_table_without_kinds(write: Write) -> None:
    path = write(
        {"user_id": "ann", **PAIR},
        {"user_id": "bob", "text": "I like lists."},
        {"user_id": " ann ", "text": "Too long.", "about": "Well."},
        {"user_id": "ann", "text": "Nice.", "prompt": "p"},
        {"user_id": "ann", "prompt": "p", "response": "r", "score": "4.5"},
        {"user_id": "ann", "prompt": "p", "response": "r", "score": 8, "best": 10},
        {"user_id": "ann", "prompt": "p", "original": "o", "edited": "e", "time": "2024-05-01", "origin": "app"},
        {"user_id": "ann", "facts.age": 34, "Facts.Home town": "Bath"},
        {"user_id": "ann", "text": "I hate lists.", "said_by": "Quoted", "id": "7.0"},
    )
    ann, bob = convert_csv(path).examples
    assert bob == PersonalizationExample.model_validate(
        {"user": {"user_id": "bob", "signals": [{"kind": "statement", "text": "I like lists."}]}}
    )
    assert ann.user.signals == (
        PreferencePair(**PAIR),
        Comment(text="Too long.", about="Well."),
        Comment(text="Nice.", prompt="p"),
        Rating(prompt="p", response="r", score=4.5),
        Rating(prompt="p", response="r", score=8, best=10),
        Edit.model_validate({"prompt": "p", "original": "o", "edited": "e", "time": "2024-05-01", "origin": "app"}),
        Demographics(facts={"age": "34", "Home town": "Bath"}),
        Statement(id="7", text="I hate lists.", said_by=Speaker.QUOTED),
    )


def test_kinds_and_held_out_pairs(write: Write) -> None:
    path = write(
        {"user_id": 7, "kind": "Comment", "text": "Nice."},
        {"user_id": 7, "kind": "", "text": "I like lists."},
        {"user_id": "7.0", "kind": "held-out", **PAIR},
        {"user_id": 7, "kind": "held_out", **PAIR, "prompt": "q"},
    )
    [example] = convert_csv(path).examples
    assert (example.user.user_id, [signal.kind for signal in example.user.signals]) == ("7", ["comment", "statement"])
    assert [pair.prompt for pair in example.tests] == ["p", "q"]


table_signals = signals.filter(lambda signal: not isinstance(signal, Conversation | Demographics))


@given(st.lists(st.tuples(words, table_signals), min_size=1, max_size=4), st.sampled_from(DELIMITERS), st.booleans())
def test_what_is_written_is_read(write: Write, rows: list[tuple[str, Any]], delimiter: str, marked: bool) -> None:
    assume(all(MISSING.isdisjoint((user_id, signal.id, signal.origin)) for user_id, signal in rows))
    path = write(
        *({"user_id": user_id, **signal.model_dump(mode="json")} for user_id, signal in rows),
        delimiter=delimiter,
        encoding="utf-8-sig" if marked else "utf-8",
    )
    users: dict[str, dict[str, Any]] = {}
    for user_id, signal in rows:
        users.setdefault(as_user_id(user_id), {}).setdefault(signal.id, signal)
    conversion = convert_csv(path)
    found = {example.user.user_id: list(example.user.signals) for example in conversion.examples}
    assert found == {user_id: list(shown.values()) for user_id, shown in users.items()}
    assert len(conversion.dropped) == len(rows) - sum(map(len, found.values()))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_quotes_and_blank_rows(tmp_path: Path, end: str) -> None:
    path = tmp_path / "table.csv"
    lines = ['"User ID"\tText\tUnnamed: 0', '"ann"\t"He said ""hi"";', 'and\tleft."\t1', "", "\t\t", "bob\tOK\t2"]
    path.write_bytes(end.join(lines).encode())
    assert [signal.text for signal in signals_of(path)] == [f'He said "hi";{end}and\tleft.', "OK"]
    assert [item.place for item in convert_csv(path).dropped] == ["table.csv.Unnamed: 0"]


def test_a_semicolon_goes_with_decimal_commas(write: Write) -> None:
    row = {"user_id": "ann", "prompt": "a, b", "response": "1,5", "score": "7,5", "best": "10,0"}
    [rating] = signals_of(write(row, delimiter=";"))
    assert (rating.prompt, rating.response, rating.score, rating.best) == ("a, b", "1,5", 7.5, 10)


def test_what_was_dropped_is_told_with_line_and_reason(write: Write, tmp_path: Path) -> None:
    path = write(
        {"user_id": "ann", "kind": "pair", **PAIR, "mood": "good"},
        {"user_id": "ann", "kind": "pair", **PAIR},
        {"user_id": "ann", "kind": "held_out", **PAIR, "chosen": "b", "rejected": "a"},
        {"user_id": "ann", "kind": "held_out", **PAIR, "prompt": "a\nquestion"},
        {"user_id": "ann", "kind": "held_out", **PAIR, "prompt": "a question"},
        {"user_id": "bob", "kind": "held_out", **PAIR},
    )
    conversion = convert_csv(path)
    assert [(item.place, item.reason) for item in conversion.dropped] == [
        ("table.csv.mood", "unknown column"),
        ("table.csv:3", "repeats an earlier row"),
        ("table.csv:4", "a signal of the kind pair has the prompt and a response of this pair"),
        ("table.csv:7", "repeats an earlier held-out pair"),
    ]
    assert conversion.summary() == {"users": 2, "signals": 1, "tests": 2, "dropped": 4}
    write_jsonl(tmp_path / "users.jsonl", conversion.examples)
    assert tuple(read_examples(tmp_path / "users.jsonl")) == conversion.examples


@pytest.mark.parametrize("missing", ["NaN", "nan", "NaT", "<NA>", "None", "null"])
def test_a_cell_may_say_that_it_is_empty(write: Write, missing: str) -> None:
    row = {"user_id": "ann", "text": "x", "time": missing, "score": missing, "id": missing, "kind": missing}
    [example] = convert_csv(write(row, {"user_id": "ann", "text": missing})).examples
    assert [signal.model_dump(include={"kind", "text", "time"}) for signal in example.user.signals] == [
        {"kind": "statement", "text": text, "time": None} for text in ("x", missing)
    ]
    with pytest.raises(InputError, match="the id of the user is empty"):
        convert_csv(write({"user_id": missing, "text": "x"}))


def test_users_of_a_table_are_the_same_however_their_ids_are_encoded(write: Write) -> None:
    names = ["caf\u00e9", "cafe\u0301", "\ufeffcaf\u00e9 "]
    [example] = convert_csv(write(*({"user_id": name, "text": f"{n}"} for n, name in enumerate(names)))).examples
    assert len(example.user.signals) == 3


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"user_id": " ", "text": "x"}, "user_id", "the id of the user is empty"),
    ({"kind": "shrug", "text": "x"}, "kind", "unknown kind 'shrug'; known names: comment"),
    ({"kind": "parr", **PAIR}, "kind", "did you mean pair"),
    (
        {"prompt": "p", "chosen": "a"},
        None,
        "the kind of a row with filled cells in chosen, prompt cannot be inferred; fill the cells of",
    ),
    ({"prompt": ""}, None, "the kind of a row without filled cells cannot be inferred"),
    ({"text": "x", "score": 4, "prompt": "p", "response": "r"}, None, "cannot be inferred"),
    ({"kind": "pair", "prompt": "p", "chosen": "a"}, "rejected", "field required"),
    ({"kind": "statement", "text": "x", "score": 4}, "score", "not permitted"),
    ({"kind": "rating", "prompt": "p", "response": "r", "score": "good"}, "score", "valid number"),
    ({"text": "x", "time": 45321}, "time", "45321 is not a Unix time .* spreadsheet date; write times in ISO 8601"),
    ({"text": "x", "said_by": "nobody"}, "said_by", "'user', 'assistant' or 'quoted'"),
    ({"text": "other", "id": "known"}, "id", "belongs to another signal of this user in line 2"),
]


@pytest.mark.parametrize(("row", "field", "says"), BAD)
def test_a_bad_row_is_named_and_can_be_skipped(write: Write, row: dict[str, Any], field: str, says: str) -> None:
    good = {"user_id": "ann", "text": "several\nlines", "id": "known"}
    path = write(good, {"user_id": "ann", **row}, {"user_id": "bob", "text": "fine"})
    with pytest.raises(InputError, match=says) as caught:
        convert_csv(path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (path, 4, field)
    bad = BadRows(skip=True)
    conversion = convert_csv(path, bad_rows=bad)
    assert [example.user.user_id for example in conversion.examples] == ["ann", "bob"]
    assert bad.count == 1
    assert [(item.file, item.line, item.field) for item in conversion.dropped] == [("table.csv", 4, field or "")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("user_id,text\nann,a,b\nbob,x\n", ":2: the row has 3 cells, and the header 2; put cells that contain the"),
        ("user_id,text,about\nann,a\nbob,x,y\n", ":2: the row has 2 cells, and the header 3; write empty cells too"),
        (
            'user_id,text\nbob,x\nann,"half a',
            r":3: malformed CSV in the row that starts here \(unexpected end of data\)",
        ),
        ('user_id,text\nann,"a"b\n', ":2: malformed CSV"),
        ("", ":1: has no column user_id, but no header; name the columns in the first row: user_id, kind"),
        ("user,text\nann,a\n", ":1: has no column user_id, but user, text;"),
        ("user_id,text,Text\nann,a,b\n", ":1, field text: the column appears twice"),
        ("user_id,text\n", r"table\.csv: contains no rows; give it rows"),
        ("user_id,text\nann,\xe9\n".encode("latin-1"), "is not UTF-8 text; save the file as UTF-8"),
        ("user_id\ttext\nann\tx\n".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_broken_table_is_one_error(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says):
        convert_csv(path)
    with pytest.raises(InputError, match="cannot be read"):
        convert_csv(tmp_path / "absent.csv")


def test_a_scale_that_is_not_given_is_never_skipped(write: Write) -> None:
    rows = [{"user_id": "ann", "prompt": "p", "response": f"r{score}", "score": score} for score in range(1, 11)]
    with pytest.raises(InputError, match=r"5 bad rows; the first: line 7: score 6 is outside .*; give best, and worst"):
        convert_csv(write(*rows))
    with pytest.raises(InputError, match="score 6 is outside the default scale"):
        convert_csv(write(*rows), bad_rows=BadRows(skip=True))
    assert len(signals_of(write(*(row | {"best": 10} for row in rows)))) == 10


def test_a_table_of_pandas(write: Write, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"user_id": [1, 2, None], "text": ["a", "b\nc", "d"], "score": [None, None, 3]})
    table.iloc[:2].to_csv(tmp_path / "table.csv")
    conversion = convert_csv(tmp_path / "table.csv")
    assert [(example.user.user_id, example.user.signals[0].kind) for example in conversion.examples] == [
        ("1", "statement"),
        ("2", "statement"),
    ]
    assert [item.place for item in conversion.dropped] == ["table.csv.column 1"]


def test_a_very_long_cell_stays_whole(write: Write) -> None:
    [signal] = signals_of(write({"user_id": "ann", "text": "long " * 100_000}))
    assert len(signal.text) == 499_999


def test_every_field_of_a_signal_is_a_column() -> None:
    assert set(COLUMNS) == {
        *("user_id", "kind", "id", "time", "origin", "said_by", "prompt", "chosen", "rejected", "response", "score"),
        *("worst", "best", "original", "edited", "text", "about"),
    }
