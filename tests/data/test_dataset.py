from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from popi.data.dataset import FEATURES, as_row, from_row, load_rows, save
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.reading import read_examples
from popi.errors import InputError, MissingExtra, PopiError
from popi.signals import Comment, Rating, Statement, UserSignals
from tests.strategies import examples

ADA = PersonalizationExample(
    user=UserSignals(
        user_id="ada",
        signals=(Statement(text="👩‍👩‍👧\x00"), Rating(prompt="p", response="r", score=10 / 3), Comment(text="no")),
    ),
    tests=(HeldOutPair(prompt="p", chosen="a", rejected="b"),),
    oracles={"truth": "- lists"},
    facts={"world": "w", "third": 1 / 3, "nested": {"x": [None, -0.0]}},
)
BOB = PersonalizationExample(user=UserSignals(user_id="bob"))


@given(examples)
def test_a_row_and_back_is_the_same(example: PersonalizationExample) -> None:
    row = as_row(example)
    assert set(row) == set(FEATURES)
    assert from_row(row) == example


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    save(iter([ADA, BOB]), tmp_path / "new" / "users")
    assert list(read_examples(tmp_path / "new" / "users")) == [ADA, BOB]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["users"]


def test_each_save_writes_what_it_is_given(tmp_path: Path) -> None:
    save([ADA], tmp_path / "first")
    save([BOB], tmp_path / "second")
    assert list(read_examples(tmp_path / "second")) == [BOB]


def test_a_failure_midway_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield ADA
        raise InputError("line 2 is broken")

    with pytest.raises(InputError, match=r"^line 2 is broken$"):
        save(broken(), tmp_path / "users")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    save([ADA], tmp_path / "users")
    with pytest.raises(InputError, match="already exists; remove it or name another folder"):
        save([BOB], tmp_path / "users")
    assert list(read_examples(tmp_path / "users")) == [ADA]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PopiError, match=r"cannot write .*; nothing was changed"):
        save([ADA], tmp_path / "file" / "users")


def test_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"x": 1}))
    with pytest.raises(InputError, match="is not a data set on disk"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    ("changed", "field", "says"),
    [
        ({"signals": ['{"kind": "statement", "text": "x"}', "{half"]}, "signals.1", "is not JSON"),
        ({"signals": ['{"kind": "statement"}']}, "user.signals.0.text", "field required"),
        ({"facts": "[1"}, "facts", "is not JSON"),
        ({"user_id": None}, "user.user_id", "field required"),
    ],
)
def test_a_bad_row_is_named_with_its_field(changed: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        from_row(as_row(ADA) | changed, file=Path("users"), line=3)
    assert (caught.value.file, caught.value.line, caught.value.field) == (Path("users"), 3, field)


def test_null_in_a_row_is_not_given() -> None:
    missing = {"signals": None, "tests": None, "oracles": None, "facts": None}
    assert from_row(as_row(BOB) | missing) == BOB


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "popi.data.dataset")
    with pytest.raises(MissingExtra, match=r"pip install 'popi\[train\]'"):
        list(read_examples(tmp_path))
