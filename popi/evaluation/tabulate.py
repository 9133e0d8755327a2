"""From what was measured of each user to the figures of the table. Nothing here asks a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """All that was measured of one user.

    Attributes:
        seed: Of the sample that the user belongs to.
        example: The user.
        summaries: By row, for the rows whose claims can be checked.
        plain: By column.
        cells: By row and column.
    """

    seed: int
    example: PersonalizationExample
    summaries: dict[str, PreferenceSummary] = field(default_factory=dict)
    plain: dict[str, Plain] = field(default_factory=dict)
    cells: dict[tuple[str, str], Measured] = field(default_factory=dict)


class Tabulator:
    """Makes the figures of one table; all of them rest on the same resamples of the users.

    Args:
        users: In any order, which changes nothing.
    """

    def __init__(self, users: Sequence[MeasuredUser]) -> None:
        self._users = sorted(users, key=lambda user: (user.seed, user.example.user.user_id))
        self._bootstrap = Bootstrap([user.example.cluster for user in self._users])
        self._seeds = np.array([user.seed for user in self._users])
        self._pairs = self._each(lambda user: len(user.example.tests))

    def cells(self, rows: Sequence[str], columns: Sequence[str], references: Sequence[str]) -> list[Cell]:
        """The cells, row by row.

        Args:
            rows: Names, in the order of the table.
            columns: Names.
            references: Rows from which the difference of every other row is told, where they are there.
        """
        return [
            self._cell(row, column, [name for name in references if name in rows and name != row])
            for row in rows
            for column in columns
        ]

    def controls(self, columns: Sequence[str]) -> list[Control]:
        """What can be had without a summary: a perfect chooser (where known), length, plain likelihood."""
        controls = [self._control("longest-answer", None, self._each(_longest))]
        for column in filter(self._scores, columns):
            plain = self._each(lambda user, column=column: wins(user.plain[column].differences).sum())  # type: ignore[misc]
            controls.append(self._control("plain-likelihood", column, plain))
        if all("perfect_choice" in user.example.facts for user in self._users):
            perfect = self._each(lambda user: sum(user.example.facts["perfect_choice"]))
            controls.append(self._control(PERFECT, None, perfect))
        return controls

    def summaries(self, row: str, reader: TasteReader | None) -> SummaryReport:
        """What the summaries of a row are like.

        Args:
            row: A row that makes claims.
            reader: Reads tastes; without it the claims are only counted.
        """
        told = [user.summaries[row] for user in self._users]
        claims: dict[str, float] = {}
        precision: list[float] = []
        if reader and all(reader.true(user.example) is not None for user in self._users):
            sorts = [
                _sort_claims(summary, reader.claimed(summary.text), reader.true(user.example) or {})
                for summary, user in zip(told, self._users, strict=True)
            ]
            total = max(1, sum(sum(sort.values()) for sort in sorts))
            claims = {name: sum(sort[name] for sort in sorts) / total for name in sorts[0]}
            checked = [(sort["true"], sum(sort.values()) - sort["unchecked"]) for sort in sorts]
            precision = [hits / count for hits, count in checked if count]
        return SummaryReport(
            row=row,
            truth=self._faithfulness(told, reader.claimed, reader.true) if reader else None,
            evidence=self._faithfulness(told, reader.claimed, reader.evident) if reader else None,
            not_enough_evidence=float(np.mean([summary.status == "not_enough_evidence" for summary in told])),
            claims=claims,
            claims_quantiles=quantiles([len(summary.claims) for summary in told]),
            precision_quantiles=quantiles(precision),
        )

    def _cell(self, row: str, column: str, references: Sequence[str]) -> Cell:
        measured = [user.cells[row, column] for user in self._users]
        hits = self._hits(row, column)
        lengths = [found.context_tokens for found in measured]
        scores = self._scores(column)
        return Cell(
            row=row,
            column=column,
            accuracy=self._accuracy(hits) if scores else None,
            by_seed=self._by_seed(hits) if scores else {},
            differences={
                name: difference
                for name in references
                if (difference := self._difference(row, name, column, scores=scores)) is not None
            },
            win_rate=self._win_rate(row, column),
            judged=sum(found.won is not None for found in measured),
            context_tokens=float(np.mean(lengths)),
            prompt_tokens=_mean([found.prompt_tokens for found in measured]),
            completion_tokens=_mean([found.completion_tokens for found in measured]),
            context_quantiles=quantiles(lengths),
            accuracy_quantiles=quantiles(hits / self._pairs) if scores else [],
            pairs=int(self._pairs.sum()) if scores else 0,
            unscored=sum(margin is None for found in measured for margin in found.margins),
        )

    def _difference(self, row: str, reference: str, column: str, *, scores: bool) -> Estimate | None:
        if scores:
            return self._accuracy(self._hits(row, column) - self._hits(reference, column))
        return self._win_rate(row, column, minus=reference)

    def _win_rate(self, row: str, column: str, *, minus: str | None = None) -> Estimate | None:
        """Of the users whose answer was judged, or how much more than under another row."""
        judged = self._each(lambda user: user.cells[row, column].won is not None)
        won = self._each(lambda user: user.cells[row, column].won or 0.0)
        other = 0.0 if minus is None else self._each(lambda user: user.cells[minus, column].won or 0.0)
        return self._bootstrap.ratio(won - other, judged)

    def _control(self, name: str, column: str | None, hits: Floats) -> Control:
        return Control(name=name, column=column, accuracy=self._accuracy(hits), by_seed=self._by_seed(hits))

    def _each(self, measure: Callable[[MeasuredUser], float]) -> Floats:
        """A figure of every user: (users,)."""
        return np.array([measure(user) for user in self._users], dtype=np.float64)

    def _scores(self, column: str) -> bool:
        """Whether a generator gives log-probabilities."""
        return any(user.plain[column].differences for user in self._users)

    def _hits(self, row: str, column: str) -> Floats:
        """How many pairs each user's margins decide rightly: (users,)."""
        return self._each(lambda user: wins(user.cells[row, column].margins).sum())

    def _accuracy(self, hits: Floats) -> Estimate:
        estimate = self._bootstrap.ratio(hits, self._pairs)
        assert estimate is not None, "every user has test pairs"
        return estimate

    def _by_seed(self, hits: Floats) -> dict[int, float]:
        return {
            int(seed): float(hits[self._seeds == seed].sum() / self._pairs[self._seeds == seed].sum())
            for seed in np.unique(self._seeds)
        }

    def _faithfulness(
        self,
        told: Sequence[PreferenceSummary],
        claimed: Callable[[str], Tastes],
        held: Callable[[PersonalizationExample], Tastes | None],
    ) -> Faithfulness | None:
        """Precision and recall of the claimed tastes against those that are held, if these are known of everybody."""
        known = [held(user.example) for user in self._users]
        if any(tastes is None for tastes in known):
            return None
        claims = [set(claimed(summary.text).items()) for summary in told]
        truth = [set(tastes.items()) for tastes in known if tastes is not None]
        right = np.array([len(ours & theirs) for ours, theirs in zip(claims, truth, strict=True)])
        return Faithfulness(
            precision=self._bootstrap.ratio(right, [len(ours) for ours in claims]),
            recall=self._bootstrap.ratio(right, [len(theirs) for theirs in truth]),
        )


def _mean(counts: Sequence[int | None]) -> float | None:
    """Of those that are known."""
    known = [count for count in counts if count is not None]
    return float(np.mean(known)) if known else None


def _longest(user: MeasuredUser) -> float:
    """How many pairs the longer answer, in characters, wins."""
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in user.example.tests]
    return sum(0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in lengths)


def _sort_claims(summary: PreferenceSummary, claimed: Tastes, truth: Tastes) -> dict[str, int]:
    """Counts the claims of one summary by what is to be thought of them."""
    true = sum(truth.get(dimension) == side for dimension, side in claimed.items())
    idle = sum(dimension not in truth for dimension in claimed)
    return {
        "true": true,
        "opposite": len(claimed) - true - idle,
        "idle": idle,
        "unchecked": max(0, len(summary.claims) - len(claimed)),
    }
