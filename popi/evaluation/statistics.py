"""Shares with intervals: a bootstrap over users, because the pairs of one user are not independent of each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Share of the resamples that an interval holds."""

TIE = 1e-4
"""Margins within this many nats of zero are ties: scores in float32 are no more precise."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Estimate(BaseModel):
    """A figure with its interval, at level :data:`LEVEL`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


def wins(margins: Sequence[float | None]) -> Floats:
    """Which pairs a margin decides rightly: 1 where it is positive, 0 where negative, 1/2 where it is a tie.

    A pair that could not be scored (``None``) is a tie as well: a generator that says nothing chooses by chance.

    Args:
        margins: h of each pair, in nats: (pairs,).

    Returns:
        (pairs,) in {0, 1/2, 1}.
    """
    h = np.array([0.0 if margin is None else margin for margin in margins], dtype=np.float64)
    return np.where(np.abs(h) <= TIE, 0.5, (h > 0).astype(np.float64))


class Bootstrap:
    """Resamples of users, drawn once and used for every figure of a table, so that differences are paired.

    Args:
        clusters: The cluster of each user; whole clusters are drawn. In most data every user is one.
        seed: Seeds the draws.
        resamples: How many times the clusters are drawn anew, with replacement.
    """

    def __init__(self, clusters: Sequence[str], *, seed: int = 0, resamples: int = 1000) -> None:
        rng = np.random.default_rng(seed)
        # In the order of their first users, so that users who are clusters of their own are drawn as they stand.
        number = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        drawn = rng.multinomial(len(number), np.full(len(number), 1 / len(number)), size=resamples)
        # How often each resample holds each user: (resamples, users). A figure of a resample is then one product.
        self._times = drawn[:, [number[name] for name in clusters]].astype(np.float64)

    def ratio(self, hits: ArrayLike, counts: ArrayLike) -> Estimate | None:
        """The pooled share, sum of hits over sum of counts, with its percentile interval.

        A paired difference of two shares over the same counts is the ratio of the difference of their hits.

        Args:
            hits: What each user adds above the line: (users,).
            counts: What each user adds below it; 0 for a user who was not asked: (users,).

        Returns:
            The estimate, or ``None`` when nobody counts.
        """
        hits_U, counts_U = np.asarray(hits, np.float64), np.asarray(counts, np.float64)
        if not counts_U.sum():
            return None
        value = float(hits_U.sum() / counts_U.sum())
        below = self._times @ counts_U
        drawn = (self._times @ hits_U)[below > 0] / below[below > 0]
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def quantiles(values: Sequence[float] | Floats) -> list[float]:
    """How values spread: their :data:`QUANTILES`, or nothing when there are no values."""
    return [float(value) for value in np.quantile(values, QUANTILES)] if len(values) else []
