"""Token trees hold sequences as they are, and let a token see its own sequence alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from popi.engine.trees import TokenTree, common_prefix

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=8)


def test_a_tree_by_hand() -> None:
    tree = TokenTree.of([[1, 2, 3], [1, 2, 4], [5], [1, 2]])
    assert tree.tokens == [1, 2, 3, 4, 5]
    assert tree.depths == [0, 1, 2, 2, 0]
    assert tree.ends == [4, 4, 3, 4, 5]
    assert tree.paths == [[0, 1, 2], [0, 1, 3], [4], [0, 1]]
    assert tree.branches


def test_a_sequence_and_its_beginnings_need_no_mask() -> None:
    assert not TokenTree.of([[1, 2], [1, 2, 3], [1, 2, 3]]).branches
    assert not TokenTree.of([]).branches


@given(sequences)
def test_a_token_sees_its_own_sequence_up_to_itself(drawn: list[list[int]]) -> None:
    tree = TokenTree.of(drawn)
    for sequence, path in zip(drawn, tree.paths, strict=True):
        assert [tree.tokens[place] for place in path] == sequence
        assert [tree.depths[place] for place in path] == list(range(len(sequence)))
        for depth, q in enumerate(path):
            assert [p for p in range(q + 1) if q < tree.ends[p]] == path[: depth + 1]


@given(sequences)
def test_nothing_is_held_twice(drawn: list[list[int]]) -> None:
    beginnings = {tuple(sequence[:end]) for sequence in drawn for end in range(1, len(sequence) + 1)}
    assert len(TokenTree.of(drawn).tokens) == len(beginnings)


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_a_common_prefix_is_the_longest(first: list[int], second: list[int]) -> None:
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == min(len(first), len(second))
