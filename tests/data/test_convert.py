from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.data.convert import Dropped, divide
from popi.data.example import text_key
from popi.errors import InputError

items = st.lists(st.frozensets(st.sampled_from("aAbcdeéfghij"), min_size=1, max_size=2), min_size=2, max_size=12)


def keys(part: list[frozenset[str]]) -> set[str]:
    return {text_key(text) for item in part for text in item}


@given(items, st.floats(0.05, 0.95), st.integers(0, 3))
def test_parts_share_no_text_and_keep_every_item_in_order(
    items: list[frozenset[str]], fraction: float, seed: int
) -> None:
    try:
        train, evaluation = divide(items, lambda item: item, fraction=fraction, seed=seed)
    except InputError as error:
        assert "leaves none of them for" in error.what
        return
    assert train and evaluation
    assert not keys(train) & keys(evaluation)
    assert sorted(map(sorted, train + evaluation)) == sorted(map(sorted, items))
    assert [item for item in items if keys([item]) & keys(train)] == train
    assert (train, evaluation) == divide(items, lambda item: item, fraction=fraction, seed=seed)


def test_items_that_share_a_text_through_another_stay_together() -> None:
    chain = [{"a", "b"}, {"c", "d"}, {"x"}, {"D ", "e"}, {"b", "c"}]
    for seed in range(5):
        train, evaluation = divide(chain, lambda item: item, fraction=0.2, seed=seed)
        assert (train, evaluation) == ([chain[0], chain[1], chain[3], chain[4]], [{"x"}])


@pytest.mark.parametrize(("fraction", "size"), [(0.3, 3), (0.25, 3), (0.24, 2), (0.94, 9)])
def test_the_fraction_is_met_to_the_nearest_item(fraction: float, size: int) -> None:
    train, evaluation = divide(list("abcdefghij"), lambda item: [item], fraction=fraction, seed=0)
    assert (len(train), len(evaluation)) == (10 - size, size)


def test_the_seed_decides() -> None:
    parts = [divide(list("abcdefghij"), lambda item: [item], fraction=0.5, seed=seed)[1] for seed in range(4)]
    assert len({tuple(part) for part in parts}) > 1


@pytest.mark.parametrize(
    ("items", "fraction", "says"),
    [
        ("ab", 0.0, "field eval_fraction: 0 is not between 0 and 1"),
        ("ab", 1.0, "field eval_fraction: 1 is not between 0 and 1"),
        ("ab", float("nan"), "field eval_fraction: nan is not between 0 and 1"),
        ("aA", 0.5, "x.json: contains 2 items in 1 group by common texts; a fraction of 0.5 leaves none of them for"),
        ("ab", 0.1, "a fraction of 0.1 leaves none of them for evaluation; give another fraction, or more data"),
        ("ab", 0.9, "a fraction of 0.9 leaves none of them for training"),
        ("", 0.5, "leaves none of them for evaluation"),
    ],
)
def test_an_impossible_division_is_refused(items: str, fraction: float, says: str) -> None:
    with pytest.raises(InputError) as caught:
        divide(list(items), lambda item: [item], fraction=fraction, seed=0, file=Path("x.json"))
    assert says in str(caught.value)


def test_a_part_of_an_example_is_named_by_its_user() -> None:
    dropped = Dropped("same", "a.json", field="tests.1", user="ann")
    assert dropped.place == "a.json, user ann, tests.1"
    assert dropped.as_record() == {"reason": "same", "file": "a.json", "field": "tests.1", "user": "ann"}
