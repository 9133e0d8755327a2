"""Shares with confidence intervals by a bootstrap over users: the pairs of one user are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Confidence level: the share of the resamples inside an interval."""

TIE = 1e-4
"""Margins within this many nats of zero are ties. Scores in float32 are not more precise."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Estimate(BaseModel):
    """A figure with its confidence interval, at level :data:`LEVEL`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


def wins(margins: Sequence[float | None]) -> Floats:
    """Preference accuracy of each pair: 1 for a positive margin, 0 for a negative one, 1/2 for a tie.

    A pair whose score failed (``None``) is a tie too: without a score, a generator chooses by chance.

    Example:
        >>> wins([1.5, -0.2, 0.0, None]).tolist()
        [1.0, 0.0, 0.5, 0.5]

    Args:
        margins: h of each pair, in nats: (pairs,).

    Returns:
        (pairs,) in {0, 1/2, 1}.
    """
    h = np.array([0.0 if margin is None else margin for margin in margins], dtype=np.float64)
    return np.where(np.abs(h) <= TIE, 0.5, (h > 0).astype(np.float64))


class Bootstrap:
    """Resamples of users. They are drawn once and used for every figure of a table, so that differences are paired.

    Args:
        clusters: The cluster of each user. Whole clusters are resampled. In most data every user is its own cluster.
        seed: Seed of the resamples.
        resamples: Number of times that the clusters are drawn, with replacement.
    """

    def __init__(self, clusters: Sequence[str], *, seed: int = 0, resamples: int = 1000) -> None:
        rng = np.random.default_rng(seed)
        # Clusters are numbered by their first users, so that the draws do not depend on their names.
        number = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        drawn = rng.multinomial(len(number), np.full(len(number), 1 / len(number)), size=resamples)
        # How often each user is in each resample: (resamples, users). The sums of a resample are then one product.
        self._times = drawn[:, [number[name] for name in clusters]].astype(np.float64)

    def ratio(self, hits: ArrayLike, counts: ArrayLike) -> Estimate | None:
        """The pooled share, sum of hits over sum of counts, with its percentile interval.

        The paired difference of two shares with the same counts is the ratio of the difference of their hits.

        Args:
            hits: The numerator of each user: (users,).
            counts: The denominator of each user; 0 for a user without measurements: (users,).

        Returns:
            The estimate, or ``None`` if all counts are 0.
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
    """The :data:`QUANTILES` of values; empty if there are no values."""
    return [float(value) for value in np.quantile(values, QUANTILES)] if len(values) else []
