"""The figures of an evaluation, as they stand in ``results.json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from popi.evaluation.statistics import Estimate

PERFECT = "perfect-chooser"
"""The control that knows each user's taste and errs only where the user acted against it."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Figures):
    """What a generator makes of a row.

    Attributes:
        row: What it was told.
        column: The generator.
        accuracy: Preference accuracy: share of test pairs with h > 0, a tie counting one half; ``None``, as all that
            rests on margins, where the backend gives no log-probabilities.
        by_seed: The accuracy in each sample.
        differences: The accuracy minus that of each reference row, on the same pairs; where there is none, the win rate
            minus theirs, for the same users.
        win_rate: Of its answers against its own answers to the bare prompt, a tie counting one half.
        judged: Number of answers behind the win rate.
        context_tokens: Mean length of what it was told, by its tokenizer.
        prompt_tokens: Mean number of tokens that it read for a judged answer, what it was told included; ``None``, as
            the next, if its server counts none.
        completion_tokens: Mean number that it wrote.
        context_quantiles: How that length spreads, see ``statistics.QUANTILES``.
        accuracy_quantiles: How the accuracy of single users spreads.
        pairs: Number of test pairs with a margin.
        unscored: Pairs that could not be scored and count as ties.
    """

    row: str
    column: str
    accuracy: Estimate | None
    by_seed: dict[int, float]
    differences: dict[str, Estimate]
    win_rate: Estimate | None
    judged: int
    context_tokens: float
    prompt_tokens: float | None
    completion_tokens: float | None
    context_quantiles: list[float]
    accuracy_quantiles: list[float]
    pairs: int
    unscored: int


class Control(_Figures):
    """What can be had without a summary.

    Attributes:
        name: How it chooses.
        column: The generator that it asks, if any.
        accuracy: Share of test pairs that it gets right, a tie counting one half.
        by_seed: The same in each sample.
    """

    name: str
    column: str | None
    accuracy: Estimate
    by_seed: dict[int, float]


class Faithfulness(_Figures):
    """Claims against tastes, pooled over all claims.

    Attributes:
        precision: Share of the claimed tastes that hold; ``None`` when nothing is claimed.
        recall: Share of the tastes that are claimed.
    """

    precision: Estimate | None
    recall: Estimate | None


class SummaryReport(_Figures):
    """What a row's summaries are like, whoever reads them.

    Attributes:
        row: Where they come from.
        truth: Faithfulness to the users' true tastes, where these are known.
        evidence: Faithfulness to what can be known from the signals.
        not_enough_evidence: Share of the summaries that say so.
        claims: Share of the claims that are ``true``, the ``opposite`` of the truth, about what the user does not
            care for (``idle``), or ``unchecked`` because they name no side of anything; empty without the truth.
        claims_quantiles: How the number of claims of a summary spreads.
        precision_quantiles: How the precision of single summaries that claim anything spreads.
    """

    row: str
    truth: Faithfulness | None
    evidence: Faithfulness | None
    not_enough_evidence: float
    claims: dict[str, float]
    claims_quantiles: list[float]
    precision_quantiles: list[float]


class Results(_Figures):
    """The whole table.

    Attributes:
        settings: What it was measured on.
        users: Number of users, over all samples.
        cells: Row by row, in each the columns.
        controls: What can be had without any summary.
        summaries: For each row that makes claims.
        left_out: Rows that could not be made, and why.
        notes: What a reader of the table has to know.
    """

    settings: dict[str, object]
    users: int
    cells: list[Cell]
    controls: list[Control]
    summaries: list[SummaryReport]
    left_out: dict[str, str]
    notes: list[str]
