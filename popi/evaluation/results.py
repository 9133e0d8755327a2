"""The figures of an evaluation, as in ``results.json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from popi.evaluation.statistics import Estimate

PERFECT = "perfect-chooser"
"""The control that knows each user's preferences and errs only where the user chose against them."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Figures):
    """The figures of a generator under a row.

    Attributes:
        row: The row.
        column: The generator.
        accuracy: Preference accuracy: the share of held-out pairs with h > 0, where a tie counts one half; ``None`` if
            the backend does not score responses, or the cell is unavailable.
        by_seed: The accuracy in each sample.
        differences: The accuracy minus that of each reference row, on the same pairs. If the backend does not score,
            the win rate minus theirs, for the same users.
        win_rate: Win rate of its responses against its own responses to the plain prompt. A tie counts one half.
        judged: Number of responses in the win rate.
        context_tokens: Mean length of the interface, by the generator's tokenizer.
        prompt_tokens: Mean length of the conversation of a judged response, interface included; ``None`` if the server
            does not count tokens, as for ``completion_tokens``.
        completion_tokens: Mean length of a judged response.
        context_quantiles: Quantiles of the length of the interface, see :data:`popi.evaluation.statistics.QUANTILES`.
        accuracy_quantiles: Quantiles of the accuracy of single users.
        pairs: Number of held-out pairs; 0 if the backend does not score.
        unscored: Number of pairs that could not be scored. They count as ties.
        error: Why the first pair could not be scored; empty if all could.
        unavailable: Why the cell has no accuracy: the generator does not accept the interface of the row, or no pair
            could be scored; ``None`` if it has one or the backend does not score.
    """

    row: str
    column: str
    accuracy: Estimate | None = None
    by_seed: dict[int, float] = {}
    differences: dict[str, Estimate] = {}
    win_rate: Estimate | None = None
    judged: int = 0
    context_tokens: float | None = None
    prompt_tokens: float | None = None
    completion_tokens: float | None = None
    context_quantiles: list[float] = []
    accuracy_quantiles: list[float] = []
    pairs: int = 0
    unscored: int = 0
    error: str = ""
    unavailable: str | None = None


class Control(_Figures):
    """The accuracy of a choice without any summary.

    Attributes:
        name: How it chooses.
        column: The generator that it uses, if any.
        accuracy: Share of held-out pairs that it decides correctly, where a tie counts one half.
        by_seed: The accuracy in each sample.
    """

    name: str
    column: str | None
    accuracy: Estimate
    by_seed: dict[int, float]


class Faithfulness(_Figures):
    """Claimed preferences compared with actual ones, pooled over all users.

    Attributes:
        precision: Share of the claimed preferences that are actual ones; ``None`` if nothing is claimed.
        recall: Share of the actual preferences that are claimed.
    """

    precision: Estimate | None
    recall: Estimate | None


class SummaryReport(_Figures):
    """The figures of a row's summaries, independent of the generators.

    Attributes:
        row: The row.
        truth: Faithfulness to the users' true preferences, where they are known.
        evidence: Faithfulness to the preferences that the signals show.
        not_enough_evidence: Share of the summaries that say that there is not enough evidence.
        claims: Share of the claims that are ``true``, the ``opposite`` of the truth, about something that the user has
            no preference in (``idle``), or ``unchecked`` because they name no side; empty if the truth is unknown.
        claims_quantiles: Quantiles of the number of claims of a summary.
        precision_quantiles: Quantiles of the precision of single summaries that claim anything.
        failed: Number of users without a summary, because writing it failed.
    """

    row: str
    truth: Faithfulness | None
    evidence: Faithfulness | None
    not_enough_evidence: float
    claims: dict[str, float]
    claims_quantiles: list[float]
    precision_quantiles: list[float]
    failed: int = 0


class Results(_Figures):
    """The whole table.

    Attributes:
        settings: The settings of the measurements.
        users: Number of users in all samples.
        cells: The cells row by row, and within a row by column.
        controls: Accuracies without any summary.
        summaries: Reports on the rows that make claims.
        left_out: Rows that could not be made, with the reasons.
        notes: Notes that a reader of the table needs.
    """

    settings: dict[str, object]
    users: int
    cells: list[Cell]
    controls: list[Control]
    summaries: list[SummaryReport]
    left_out: dict[str, str]
    notes: list[str]
