"""Evaluation on held-out users during training."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from popi.data.example import PersonalizationExample
from popi.roles import Failure, PreferenceInference, infer_or_nothing
from popi.summary import PreferenceSummary
from popi.training.generator import check_finite, diverged
from popi.training.objective import accuracy
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.reference import Reference
from popi.training.scoring import ConditionedPair, Scorer


@dataclass(frozen=True, slots=True)
class HeldOutEval:
    """Results on held-out users.

    Attributes:
        accuracy: Share of pairs with a positive margin. A tie counts one half.
        margin: Mean margin h before beta, in nats.
        summary_tokens: Mean number of tokens that the generator reads about a user.
        not_enough_evidence: Share of summaries without a claim.
        failed: Share of replies that are not summaries. They count as summaries without a claim.
        samples: Some users with their summaries.
    """

    accuracy: float
    margin: float
    summary_tokens: float
    not_enough_evidence: float
    failed: float
    samples: list[dict[str, Any]]

    def metrics(self) -> dict[str, float]:
        """All numbers."""
        return {name: value for name, value in asdict(self).items() if name != "samples"}


def evaluate_held_out(
    inference: PreferenceInference | None,
    scorer: Scorer,
    users: Sequence[PersonalizationExample],
    reference: Reference,
    *,
    step: int,
    samples: int = 4,
    ranks: Ranks = ONE_RANK,
) -> HeldOutEval:
    """Infers summaries of held-out users, and scores their pairs under them. The ranks share the users.

    Args:
        inference: Infers what the generator reads about a user; ``None`` evaluates plain prompts.
        scorer: Scores with the generator.
        users: The users.
        reference: The reference of their pairs.
        step: Number of steps of the run so far.
        samples: Number of users whose summaries are returned.
        ranks: The ranks of the run. Each must have all weights of both models.

    Raises:
        PopiError: If a logit of the writer or a margin is not finite.
    """
    with ranks.alone():
        own, own_failures = _measure(inference, scorer, ranks.share(users), reference)
    measured, failures = ranks.gather(own), ranks.gather(own_failures)
    if any(failure.failure == "malformed" for failure in failures):
        # A model in this process has no other malformed response than logits that are not finite.
        raise diverged("a logit of the writer", math.nan, step)
    margins = torch.cat([margins for _, margins in measured])
    check_finite("the mean margin of held-out users", float(margins.mean()), step)
    inferred = [summary for summary, _ in measured if summary is not None]
    return HeldOutEval(
        accuracy=accuracy(margins),
        margin=float(margins.mean()),
        summary_tokens=sum(summary.provenance.tokens for summary in inferred) / len(users),
        not_enough_evidence=sum(summary.status == "not_enough_evidence" for summary in inferred) / len(users),
        failed=len(failures) / len(users),
        samples=[{"user_id": summary.user_id, "text": summary.text} for summary in inferred[:samples]],
    )


def _measure(
    inference: PreferenceInference | None,
    scorer: Scorer,
    users: Sequence[PersonalizationExample],
    reference: Reference,
) -> tuple[list[tuple[PreferenceSummary | None, Tensor]], list[Failure]]:
    """The summary of each user and the margins of their pairs, and the failed summaries."""
    if not users:
        return [], []
    summaries: Sequence[PreferenceSummary | None] = [None] * len(users)
    failures: Sequence[Failure] = []
    if inference is not None:
        summaries, failures = asyncio.run(infer_or_nothing(inference, [example.user for example in users]))
    items = [
        ConditionedPair(summary, pair, reference[pair])
        for example, summary in zip(users, summaries, strict=True)
        for pair in example.tests
    ]
    margins = scorer.ratios(items).margins_N.split([len(example.tests) for example in users])
    return list(zip(summaries, margins, strict=True)), list(failures)
