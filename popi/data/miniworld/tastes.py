"""Tastes: the preferences of users of the mini world, and how signals change the posterior over them.

A taste is a vector over ten dimensions of an answer: +1 prefers the first side, -1 the second, 0 has no preference. A
user cares about two to five dimensions, all to the same degree. That gives 12,564 hypotheses, few enough to compute the
posterior over all of them exactly.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

Style = NDArray[np.int8]
"""A vector over the dimensions: a taste in {-1, 0, 1}, or the style of an answer in {-1, 1} (0: not shown)."""

Floats = NDArray[np.float32]

SIDES: dict[str, tuple[str, str]] = {
    "opening": ("greeting", "direct"),
    "emoji": ("emoji", "plain"),
    "format": ("bullets", "prose"),
    "stance": ("confident", "hedged"),
    "tone": ("casual", "formal"),
    "level": ("simple", "technical"),
    "units": ("metric", "imperial"),
    "length": ("long", "short"),
    "examples": ("example", "abstract"),
    "closing": ("question", "stop"),
}
"""The dimensions in the order in which an answer shows them, each with the names of its two sides."""

DIMENSIONS = tuple(SIDES)
CARED = (2, 5)
"""Minimum and maximum number of dimensions that a user cares about. The number is uniform between them."""

NOISE = 0.05
"""Probability that a user acts against their own utility."""

PAIR_DIFFERENCES = (1, 2)
"""Possible numbers of dimensions in which the two answers of a pair differ, all equally likely."""


@cache
def hypotheses() -> Style:
    """All tastes in a fixed order: (hypotheses, dimensions)."""
    rows: list[Style] = []
    for count in range(CARED[0], CARED[1] + 1):
        for chosen in combinations(range(len(DIMENSIONS)), count):
            for signs in product((1, -1), repeat=count):
                row = np.zeros(len(DIMENSIONS), np.int8)
                row[list(chosen)] = signs
                rows.append(row)
    return np.stack(rows)


@cache
def cared() -> NDArray[np.int64]:
    """The number of dimensions that each hypothesis cares about: (hypotheses,)."""
    return np.asarray(np.abs(hypotheses()).sum(axis=1), dtype=np.int64)


@cache
def log_prior() -> Floats:
    """Log of the prior, uniform over the number of dimensions and over all tastes of a number: (hypotheses,)."""
    numbers, counts = np.unique(cared(), return_counts=True)
    weight = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return -np.log([len(numbers) * weight[k] for k in cared().tolist()]).astype(np.float32)


def draw_taste(rng: np.random.Generator) -> Style:
    """Draws a taste from the prior."""
    taste = np.zeros(len(DIMENSIONS), np.int8)
    chosen = rng.choice(len(DIMENSIONS), size=rng.integers(CARED[0], CARED[1] + 1), replace=False)
    taste[chosen] = rng.choice(np.array([1, -1], np.int8), size=len(chosen))
    return taste


@cache
def decisive_rate() -> Floats:
    """The probability that a hypothesis prefers one answer of a random pair: (hypotheses,).

    For a user who cares about k of D dimensions, one difference decides with probability k/D. Two differences decide
    unless the user cares about neither, or cares about both and they cancel (half of the cases).
    """
    k, size = cared().astype(np.float64), len(DIMENSIONS)
    one = k / size
    pairs = size * (size - 1) / 2
    two = 1 - (size - k) * (size - k - 1) / 2 / pairs - 0.5 * (k * (k - 1) / 2) / pairs
    return np.asarray((one + two) / 2, dtype=np.float32)


# The log-likelihood of each kind of observation under every hypothesis: (hypotheses,). -inf is impossible.


def _log(values: NDArray[np.floating]) -> Floats:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values), dtype=np.float32)


def of_choice(difference: Style) -> Floats:
    """A choice between two answers whose styles differ by ``difference`` (chosen minus rejected, in {-1, 0, 1}).

    The division accounts for the fact that users choose only between answers of which they prefer one.
    """
    return _of_choice(tuple(difference.tolist()))


@lru_cache(maxsize=256)
def _of_choice(difference: tuple[int, ...]) -> Floats:
    gain = hypotheses() @ np.array(difference, np.int8)
    chance = np.where(gain > 0, 1 - NOISE, np.where(gain < 0, NOISE, 0.0))
    return _log(chance / decisive_rate())


@cache
def of_remark(dimension: int, side: int) -> Floats:
    """A remark in words for one side of a dimension, uniform over the dimensions that the user cares about."""
    liked = hypotheses()[:, dimension] * side
    chance = np.where(liked > 0, 1 - NOISE, np.where(liked < 0, NOISE, 0.0))
    return _log(chance / cared())


def of_edit(style: Style, dimension: int) -> Floats:
    """An edit that changes the side of one dimension of an answer of this style.

    Only answers that miss a taste are edited. The user changes one of the missed dimensions, or by mistake any one.
    """
    missed = hypotheses() == -style
    count = missed.sum(axis=1)
    meant = np.where(count > 0, missed[:, dimension] / np.maximum(count, 1), 0.0)
    chance = (1 - NOISE) * meant + NOISE / len(DIMENSIONS)
    return _log(np.where(count > 0, chance, 0.0) / (1 - 0.5 ** cared()))


def score_of(gain: NDArray[np.integer], count: NDArray[np.integer]) -> NDArray[np.int64]:
    """The score from 1 to 5 that a user gives, by the utility as a share of its maximum."""
    return np.clip(np.floor((gain / count + 1) * 2.5).astype(np.int64) + 1, 1, 5)


def of_rating(style: Style, score: int) -> Floats:
    """A score from 1 to 5 for an answer of this style. A mistaken score is uniform over all five."""
    exact = score_of(hypotheses() @ style, cared()) == score
    return _log((1 - NOISE) * exact + NOISE / 5)


@cache
def of_trade(dimension: int, side: int) -> Floats:
    """An occupation that is associated with one side of one dimension.

    Half of the users have a random occupation, the others one that is associated with one of their tastes.
    """
    liked = hypotheses()[:, dimension] == side
    return _log(0.5 / (2 * len(DIMENSIONS)) + 0.5 * liked / cared())


def posterior(log_likelihoods: Floats) -> Floats:
    """The exact posterior after each signal.

    Args:
        log_likelihoods: (signals, hypotheses), in the order of observation.

    Returns:
        (signals + 1, hypotheses): row n is the posterior after n signals, row 0 the prior.
    """
    rows = np.concatenate([log_prior()[None], log_likelihoods]).cumsum(axis=0)
    rows = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(rows / rows.sum(axis=1, keepdims=True), dtype=np.float32)


@cache
def _indicators() -> Floats:
    table = hypotheses()
    flat = np.concatenate([table == 1, table == -1], axis=1)
    return np.asarray(flat, dtype=np.float32)


def marginals(belief: Floats) -> Floats:
    """The marginals of a posterior in each dimension: (..., hypotheses) to (..., dimensions, 3).

    The last axis is the probability that the user prefers the first side, the second side, or neither.
    """
    liked = (belief @ _indicators()).reshape(*belief.shape[:-1], 2, len(DIMENSIONS))
    neither = np.maximum(1 - liked.sum(axis=-2, keepdims=True), 0)
    return np.asarray(np.concatenate([liked, neither], axis=-2).swapaxes(-1, -2), dtype=np.float32)


@cache
def _questions() -> tuple[Style, Floats]:
    """Every possible difference of a pair, and the sign of each hypothesis' preference: (Q, D), (hypotheses, Q)."""
    rows = []
    for count in PAIR_DIFFERENCES:
        for chosen in combinations(range(len(DIMENSIONS)), count):
            for signs in product((1, -1), repeat=count - 1):
                row = np.zeros(len(DIMENSIONS), np.int8)
                row[list(chosen)] = (1, *signs)
                # Both numbers of differences are equally likely, although more pairs have two.
                rows.append((row, 1 / (len(list(combinations(range(len(DIMENSIONS)), count))) * 2 ** (count - 1))))
    table = np.stack([row for row, _ in rows])
    weight = np.array([value for _, value in rows], np.float32) / len(PAIR_DIFFERENCES)
    signs_by_hypothesis = np.sign(hypotheses() @ table.T).astype(np.float32)
    return table, signs_by_hypothesis * weight / decisive_rate()[:, None]


def best_claims(belief: Floats, *, least_gain: float = 0.004) -> Style:
    """The evidence oracle: the claims from which a perfect reader predicts the user's choices best.

    The reader prefers the answer that meets more claims. Greedily, the best claim is added or removed as long as the
    expected accuracy on random pairs increases by ``least_gain`` per claim.

    Args:
        belief: One posterior: (hypotheses,).
        least_gain: Minimum increase of the expected accuracy per claim.

    Returns:
        (dimensions,) in {-1, 0, 1}; all zero if no claim increases the accuracy enough.
    """
    table, signed = _questions()
    expected = belief @ signed
    claims = np.zeros(len(DIMENSIONS), np.int8)
    best = 0.0
    while True:
        trials = np.repeat(claims[None], 3 * len(DIMENSIONS), axis=0)
        for place in range(len(trials)):
            trials[place, place // 3] = place % 3 - 1
        gains = np.sign(trials @ table.T) @ expected / 2 - least_gain * np.abs(trials).sum(axis=1)
        winner = int(gains.argmax())
        if gains[winner] <= best + 1e-7:
            return claims
        best, claims = float(gains[winner]), trials[winner]
