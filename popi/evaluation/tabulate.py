"""Computes the figures of the table from the measurements of each user, without any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from popi.data.example import PersonalizationExample
from popi.evaluation.judges import TasteReader, Tastes
from popi.evaluation.measure import Measured, Plain
from popi.evaluation.results import PERFECT, Cell, Control, Faithfulness, SummaryReport
from popi.evaluation.statistics import Bootstrap, Estimate, Floats, quantiles, wins
from popi.summary import PreferenceSummary


@dataclass(slots=True)
class MeasuredUser:
    """All measurements of one user.

    Attributes:
        seed: Seed of the user's sample.
        example: The user.
        summaries: The summaries by row, for the rows whose claims can be checked. A failed one is missing.
        plain: The measurements on the plain prompts, by column.
        cells: The measurements by row and column. An unavailable cell is missing.
    """

    seed: int
    example: PersonalizationExample
    summaries: dict[str, PreferenceSummary] = field(default_factory=dict)
    plain: dict[str, Plain] = field(default_factory=dict)
    cells: dict[tuple[str, str], Measured] = field(default_factory=dict)


class Tabulator:
    """Computes the figures of one table. All of them use the same resamples of the users.

    Args:
        users: The users. Their order has no effect.
    """

    def __init__(self, users: Sequence[MeasuredUser]) -> None:
        self._users = sorted(users, key=lambda user: (user.seed, user.example.user.user_id))
        self._bootstrap = Bootstrap([user.example.cluster for user in self._users])
        self._seeds = np.array([user.seed for user in self._users])
        self._pairs = self._each(lambda user: len(user.example.tests))

    @property
    def clusters(self) -> int | None:
        """The number of clusters of users, or ``None`` if every user is one."""
        count = len({user.example.cluster for user in self._users})
        return count if count < len(self._users) else None

    def cells(
        self,
        rows: Sequence[str],
        columns: Sequence[str],
        references: Sequence[str],
        *,
        refused: Mapping[tuple[str, str], str] | None = None,
    ) -> list[Cell]:
        """The cells, row by row.

        Args:
            rows: Names of the rows, in the order of the table.
            columns: Names of the columns.
            references: Rows from which the difference of every other row is computed, if they are in the table.
            refused: Why cells were not measured, by row and column.
        """
        refused = refused or {}
        return [
            Cell(row=row, column=column, unavailable=refused[row, column])
            if (row, column) in refused
            else self._cell(row, column, [name for name in references if self._is_reference(name, row, column, rows)])
            for row in rows
            for column in columns
        ]

    def controls(self, columns: Sequence[str]) -> list[Control]:
        """Choices without a summary: a perfect chooser (if known), by length, and by plain likelihood."""
        controls = [self._control("longest-answer", None, self._each(_longest))]
        for column in columns:
            if any(_any_score(user.plain[column].differences) for user in self._users):
                plain = self._each(lambda user, column=column: wins(user.plain[column].differences).sum())  # type: ignore[misc]
                controls.append(self._control("plain-likelihood", column, plain))
        perfect = [_perfect(user) for user in self._users]
        if None not in perfect:
            controls.append(self._control(PERFECT, None, np.array(perfect, dtype=np.float64)))
        return controls

    def summaries(self, row: str, reader: TasteReader | None) -> SummaryReport:
        """The report on the summaries of a row. A failed summary claims nothing.

        Args:
            row: A row that makes claims.
            reader: Reads preferences. Without it the claims are only counted.
        """
        summaries = [user.summaries.get(row) for user in self._users]
        present = [summary for summary in summaries if summary is not None]
        claims: dict[str, float] = {}
        precision: list[float] = []
        if reader and all(reader.true(user.example) is not None for user in self._users):
            sorts = [
                _sort_claims(summary, reader.claimed(summary.text), reader.true(user.example) or {})
                for summary, user in zip(summaries, self._users, strict=True)
                if summary is not None
            ]
            total = max(1, sum(sum(sort.values()) for sort in sorts))
            claims = {name: sum(sort[name] for sort in sorts) / total for name in CLAIMS}
            checked = [(sort["true"], sum(sort.values()) - sort["unchecked"]) for sort in sorts]
            precision = [hits / count for hits, count in checked if count]
        return SummaryReport(
            row=row,
            truth=self._faithfulness(summaries, reader.claimed, reader.true) if reader else None,
            evidence=self._faithfulness(summaries, reader.claimed, reader.evident) if reader else None,
            not_enough_evidence=_mean([summary.status == "not_enough_evidence" for summary in present]) or 0.0,
            claims=claims,
            claims_quantiles=quantiles([len(summary.claims) for summary in present]),
            precision_quantiles=quantiles(precision),
            failed=len(summaries) - len(present),
        )

    def _cell(self, row: str, column: str, references: Sequence[str]) -> Cell:
        measured = [user.cells[row, column] for user in self._users]
        lengths = [found.context_tokens for found in measured if found.context_tokens is not None]
        scored = self._scored(row, column)
        hits = self._hits(row, column)
        margins = [margin for found in measured for margin in found.margins]
        error = next((found.error for found in measured if None in found.margins), "")
        unavailable = None if scored or not margins else f"none of its {len(margins)} pairs could be scored ({error})"
        return Cell(
            row=row,
            column=column,
            accuracy=self._accuracy(hits) if scored else None,
            by_seed=self._by_seed(hits) if scored else {},
            differences={} if unavailable else self._differences(row, references, column, scored=scored),
            win_rate=self._win_rate(row, column),
            judged=sum(found.won is not None for found in measured),
            context_tokens=_mean(lengths),
            prompt_tokens=_mean([found.prompt_tokens for found in measured]),
            completion_tokens=_mean([found.completion_tokens for found in measured]),
            context_quantiles=quantiles(lengths),
            accuracy_quantiles=quantiles(hits / self._pairs) if scored else [],
            pairs=len(margins),
            unscored=sum(margin is None for margin in margins),
            error=error,
            unavailable=unavailable,
        )

    def _is_reference(self, name: str, row: str, column: str, rows: Sequence[str]) -> bool:
        """Whether the difference from a row can be computed: both are measured, and if one has scores, both have."""
        if name not in rows or name == row or any((name, column) not in user.cells for user in self._users):
            return False
        return self._scored(name, column) == self._scored(row, column)

    def _differences(self, row: str, references: Sequence[str], column: str, *, scored: bool) -> dict[str, Estimate]:
        if scored:
            hits = self._hits(row, column)
            return {name: self._accuracy(hits - self._hits(name, column)) for name in references}
        found = {name: self._win_rate(row, column, minus=name) for name in references}
        return {name: difference for name, difference in found.items() if difference is not None}

    def _win_rate(self, row: str, column: str, *, minus: str | None = None) -> Estimate | None:
        """The win rate of the users who were judged, possibly minus that of another row."""
        judged = self._each(lambda user: user.cells[row, column].won is not None)
        won = self._each(lambda user: user.cells[row, column].won or 0.0)
        other = 0.0 if minus is None else self._each(lambda user: user.cells[minus, column].won or 0.0)
        return self._bootstrap.ratio(won - other, judged)

    def _control(self, name: str, column: str | None, hits: Floats) -> Control:
        return Control(name=name, column=column, accuracy=self._accuracy(hits), by_seed=self._by_seed(hits))

    def _each(self, measure: Callable[[MeasuredUser], float]) -> Floats:
        """A figure of every user: (users,)."""
        return np.array([measure(user) for user in self._users], dtype=np.float64)

    def _scored(self, row: str, column: str) -> bool:
        """Whether any pair of a cell was scored."""
        return any(_any_score(user.cells[row, column].margins) for user in self._users)

    def _hits(self, row: str, column: str) -> Floats:
        """The number of pairs of each user that the margins decide correctly: (users,)."""
        return self._each(lambda user: wins(user.cells[row, column].margins).sum())

    def _accuracy(self, hits: Floats) -> Estimate:
        estimate = self._bootstrap.ratio(hits, self._pairs)
        assert estimate is not None, "every user has held-out pairs"
        return estimate

    def _by_seed(self, hits: Floats) -> dict[int, float]:
        return {
            int(seed): float(hits[self._seeds == seed].sum() / self._pairs[self._seeds == seed].sum())
            for seed in np.unique(self._seeds)
        }

    def _faithfulness(
        self,
        summaries: Sequence[PreferenceSummary | None],
        claimed: Callable[[str], Tastes],
        actual: Callable[[PersonalizationExample], Tastes | None],
    ) -> Faithfulness | None:
        """Precision and recall of the claimed preferences; ``None`` if the actual ones of some user are unknown."""
        known = [actual(user.example) for user in self._users]
        if any(tastes is None for tastes in known):
            return None
        claims = [set() if summary is None else set(claimed(summary.text).items()) for summary in summaries]
        truth = [set(tastes.items()) for tastes in known if tastes is not None]
        right = np.array([len(ours & theirs) for ours, theirs in zip(claims, truth, strict=True)])
        return Faithfulness(
            precision=self._bootstrap.ratio(right, [len(ours) for ours in claims]),
            recall=self._bootstrap.ratio(right, [len(theirs) for theirs in truth]),
        )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the known values."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _any_score(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _longest(user: MeasuredUser) -> float:
    """The number of pairs in which the longer response, in characters, is the chosen one."""
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in user.example.tests]
    return sum(0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in lengths)


def _perfect(user: MeasuredUser) -> float | None:
    """The number of pairs that the perfect chooser decides correctly, if the facts of the user say so."""
    known = user.example.facts.get("perfect_choice")
    if not isinstance(known, list) or not all(isinstance(value, int | float) for value in known):
        return None
    return float(sum(known)) if len(known) == len(user.example.tests) else None


CLAIMS = ("true", "opposite", "idle", "unchecked")
"""The kinds of claims, see :class:`popi.evaluation.results.SummaryReport`."""


def _sort_claims(summary: PreferenceSummary, claimed: Tastes, truth: Tastes) -> dict[str, int]:
    """The number of claims of one summary of each of :data:`CLAIMS`."""
    true = sum(truth.get(dimension) == side for dimension, side in claimed.items())
    idle = sum(dimension not in truth for dimension in claimed)
    unchecked = max(0, len(summary.claims) - len(claimed))
    return dict(zip(CLAIMS, (true, len(claimed) - true - idle, idle, unchecked), strict=True))
