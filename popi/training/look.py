"""A look at held-out users while training goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from popi.data.example import PersonalizationExample
from popi.errors import BackendError
from popi.roles import PreferenceInference, infer_or_nothing
from popi.summary import PreferenceSummary
from popi.training.generator import check_finite, diverged
from popi.training.objective import accuracy
from popi.training.scoring import Judged, PairScorer, Reference


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Attributes:
        accuracy: Share of the pairs whose margin is positive; a tie counts half.
        margin: The mean of h, in nats.
        summary_tokens: The mean length of what the generator is told.
        not_enough_evidence: Share of the summaries that say so.
        samples: A few users with their summaries.
    """

    accuracy: float
    margin: float
    summary_tokens: float
    not_enough_evidence: float
    samples: list[dict[str, Any]]

    def figures(self) -> dict[str, float]:
        """The numbers alone."""
        return {name: value for name, value in asdict(self).items() if name != "samples"}


async def look(
    inference: PreferenceInference | None,
    scorer: PairScorer,
    users: Sequence[PersonalizationExample],
    reference: Reference,
    *,
    step: int,
    samples: int = 4,
) -> Look:
    """Infers summaries of users who are not learned from, and scores their pairs under them.

    Args:
        inference: What tells the generator of a user; ``None`` is the bare prompt.
        scorer: Scores with the generator.
        users: The users.
        reference: Of their pairs.
        step: Steps of the run before it.
        samples: How many summaries are kept.

    Raises:
        PopiError: If a logit of the writer or a margin is no number.
    """
    told: Sequence[PreferenceSummary | None] = [None] * len(users)
    if inference is not None:
        try:
            told, _ = await infer_or_nothing(inference, [example.user for example in users])
        except BackendError as error:
            # A backend makes one error of all that its model raises; this one is the training's.
            if isinstance(error.__cause__, ArithmeticError):
                raise diverged("a logit of the writer", math.nan, step) from error
            raise
    items = [
        Judged(None if summary is None else summary.text, pair, reference[pair])
        for example, summary in zip(users, told, strict=True)
        for pair in example.tests
    ]
    margins = scorer.margins(items)
    check_finite("the mean margin of held-out users", float(margins.mean()), step)
    summaries = [summary for summary in told if summary is not None]
    return Look(
        accuracy=accuracy(margins),
        margin=float(margins.mean()),
        summary_tokens=sum(summary.provenance.tokens for summary in summaries) / len(users),
        not_enough_evidence=sum(summary.status == "not_enough_evidence" for summary in summaries) / len(users),
        samples=[{"user_id": summary.user_id, "text": summary.text} for summary in summaries[:samples]],
    )
