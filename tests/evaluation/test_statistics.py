"""Shares and their intervals, with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.evaluation.statistics import TIE, Bootstrap, wins

COUNTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda pair: (min(pair), max(pair))), min_size=1, max_size=30
).filter(lambda users: any(count for _, count in users))


def names(count: int) -> list[str]:
    return [str(place) for place in range(count)]


def test_a_positive_margin_wins_a_negative_loses_and_ties_and_failures_count_half() -> None:
    assert wins([1.5, -0.2, 0.0, TIE / 2, -TIE / 2, None]).tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5]


def test_four_users() -> None:
    hits = [wins([margin]).sum() for margin in (2.0, -1.0, 0.0, 3.0)]
    estimate = Bootstrap(names(4)).ratio(hits, [1, 1, 1, 1])
    assert estimate is not None
    assert estimate.value == 0.625  # (1 + 0 + 1/2 + 1) / 4


def test_pairs_weigh_alike_whoever_they_are_of() -> None:
    estimate = Bootstrap(names(2)).ratio([3, 0], [3, 1])
    assert estimate is not None
    assert estimate.value == 0.75
    assert (estimate.low, estimate.high) == (0, 1)  # one draw in four holds the same user twice


def test_a_constant_paired_difference_has_no_width() -> None:
    first, second = np.array([4, 3, 2, 1]), np.array([3, 2, 1, 0])
    estimate = Bootstrap(names(4)).ratio(first - second, [4, 4, 4, 4])
    assert estimate is not None
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_the_interval_is_as_wide_as_theory_says() -> None:
    estimate = Bootstrap(names(400), resamples=4000).ratio([0, 1] * 200, np.ones(400))
    assert estimate is not None
    half_width = 1.96 * (0.25 / 400) ** 0.5
    assert estimate.high - 0.5 == pytest.approx(half_width, rel=0.15)
    assert 0.5 - estimate.low == pytest.approx(half_width, rel=0.15)


def test_pairs_of_one_user_are_not_independent() -> None:
    together = Bootstrap(names(20)).ratio([0, 10] * 10, [10] * 20)
    alone = Bootstrap(names(200)).ratio([0, 1] * 100, [1] * 200)
    assert together is not None
    assert alone is not None
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_nobody_counts() -> None:
    assert Bootstrap(names(3)).ratio([0, 0, 0], [0, 0, 0]) is None


@given(COUNTS)
def test_the_interval_holds_the_share_and_stays_within_0_and_1(users: list[tuple[int, int]]) -> None:
    hits, counts = zip(*users, strict=True)
    estimate = Bootstrap(names(len(users))).ratio(hits, counts)
    assert estimate is not None
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.value == pytest.approx(sum(hits) / sum(counts))


@given(COUNTS, st.integers(0, 5))
def test_the_same_seed_gives_the_same_interval(users: list[tuple[int, int]], seed: int) -> None:
    hits, counts = zip(*users, strict=True)
    first, second = (Bootstrap(names(len(users)), seed=seed).ratio(hits, counts) for _ in range(2))
    assert first == second


def test_users_of_one_cluster_are_drawn_together() -> None:
    hits = [0] * 100 + [1] * 100
    fours = Bootstrap([str(place // 4) for place in range(200)]).ratio(hits, np.ones(200))
    single = Bootstrap(names(200)).ratio(hits, np.ones(200))
    assert fours is not None
    assert single is not None
    assert fours.high - fours.low == pytest.approx(2 * (single.high - single.low), rel=0.15)
