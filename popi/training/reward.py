"""The reward of a summary: the loss of held-out pairs under it, which can train the generator in the same passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from popi.data.example import HeldOutPair
from popi.roles import Failure
from popi.seeds import seed_of
from popi.summary import Author, PreferenceSummary, Provenance, summarize_claims
from popi.training.generator import check_finite, pair_metrics
from popi.training.objective import LOSSES, LogRatios, Loss, rewards
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.reference import Reference
from popi.training.scoring import ConditionedPair, PairScorer, Scorer
from popi.training.updates import GeneratorUpdate


class PairReward:
    """Rewards summaries by the preference objective. It is a :class:`popi.training.writer.RewardFn`.

    All summaries of a user in a step are scored on the same pairs. If the generator is trained, it is trained on one of
    these pairs under each summary: scoring a pair costs a third of training on it.

    A reply that is not a summary gets the reward of the summary that says "not enough evidence". Pairs that a served
    generator could not score are left out. A summary without any other pair has no reward, and no advantage.

    Args:
        scorer: Scores with the generator.
        pairs: The held-out pairs of each user.
        reference: The reference of these pairs.
        loss: The objective.
        beta: Beta in the generator's loss.
        reward_beta: Beta in the reward.
        pairs_per_summary: Number of a user's pairs that score a summary.
        length_penalty: Cost of a token of the summary. Citations are not counted, because the generator never reads
            them.
        count_tokens: Counts the tokens of a text with the writer's tokenizer.
        seed: Seed of the run.
        update: Updates the generator with the gradient of its loss; ``None`` leaves it as it is.
        ranks: The ranks of the run. Each rewards summaries of other users.
    """

    def __init__(
        self,
        scorer: Scorer,
        pairs: Sequence[Sequence[HeldOutPair]],
        reference: Reference,
        *,
        loss: Loss,
        beta: float,
        reward_beta: float,
        pairs_per_summary: int,
        length_penalty: float,
        count_tokens: Callable[[str], int],
        seed: int,
        update: GeneratorUpdate | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self._scorer, self._pairs, self._reference = scorer, pairs, reference
        self._loss, self._beta, self._reward_beta = LOSSES[loss], beta, reward_beta
        self._count, self._length_penalty, self._seed = pairs_per_summary, length_penalty, seed
        self._count_tokens = count_tokens
        self._update, self._ranks = update, ranks

    def __call__(
        self, users: Sequence[int], replies: Sequence[PreferenceSummary | Failure], step: int
    ) -> tuple[list[float], dict[str, float]]:
        """Rewards each summary; see :class:`popi.training.writer.RewardFn`. The metrics are those of all ranks.

        Raises:
            PopiError: If a loss or the norm of a gradient is not finite.
        """
        summaries = [_no_evidence(reply) if isinstance(reply, Failure) else reply for reply in replies]
        chosen = [self._choose(user, step) for user in users]
        read = self._scorer.tokens_read
        items = [
            ConditionedPair(summary, pair, self._reference[pair])
            for summary, pairs in zip(summaries, chosen, strict=True)
            for pair in pairs
        ]
        ratios, scored = self._score(items, _trained(users, chosen))
        is_scored_N = torch.tensor(scored)
        there = LogRatios(ratios.chosen_N[is_scored_N], ratios.rejected_N[is_scored_N])
        loss = self._loss(there.margins_N, self._beta).mean().item()
        metrics = {
            **self._ranks.mean(pair_metrics(there, self._beta, loss), weight=len(there.margins_N)),
            **self._ranks.mean(
                {**_summary_metrics(replies, summaries), "rewards/failed": 1 - sum(scored) / len(scored)}
            ),
            "tokens/scoring": self._ranks.total(self._scorer.tokens_read - read),
        }
        check_finite("the loss", metrics["generator/loss"], step)
        if self._update is not None and (norm := self._update.step(step)) is not None:
            metrics["generator/grad_norm"] = norm
        counts = [len(pairs) for pairs in chosen]
        losses = self._loss(ratios.margins_N, self._reward_beta).split(counts)
        parts = zip(losses, is_scored_N.split(counts), summaries, strict=True)
        return [self._reward(losses_P[scored_P], summary) for losses_P, scored_P, summary in parts], metrics

    def _reward(self, losses_P: torch.Tensor, summary: PreferenceSummary) -> float:
        """The reward of a summary from those of its pairs that were scored; NaN if none was."""
        tokens = torch.tensor(float(self._count_tokens(summary.text)))
        return rewards(losses_P, tokens, self._length_penalty).item()

    def _choose(self, user: int, step: int) -> list[HeldOutPair]:
        """The pairs that score a user's summaries in a step."""
        pairs = self._pairs[user]
        rng = np.random.default_rng(seed_of(self._seed, "pairs", step, user))
        return [pairs[place] for place in rng.permutation(len(pairs))[: self._count]]

    def _score(self, items: Sequence[ConditionedPair], trained: Sequence[int]) -> tuple[LogRatios, list[bool]]:
        """Scores the items, and accumulates the gradient of the mean loss of those that the generator is trained on.

        Also returns which items were scored.
        """
        scored = [True] * len(items)
        ratios_2_N = torch.zeros(2, len(items), dtype=torch.float64)
        trained = trained if self._update is not None else []
        for places, found in self._train([items[place] for place in trained]):
            at = [trained[place] for place in places]
            ratios_2_N[:, at] = torch.stack([found.chosen_N, found.rejected_N]).detach().cpu()
        others = sorted(set(range(len(items))) - set(trained))
        found, known = self._scorer.try_ratios([items[place] for place in others])
        ratios_2_N[:, others] = torch.stack([found.chosen_N, found.rejected_N])
        for place, is_known in zip(others, known, strict=True):
            scored[place] = is_known
        return LogRatios(*ratios_2_N), scored

    def _train(self, items: Sequence[ConditionedPair]) -> Iterator[tuple[list[int], LogRatios]]:
        if self._update is None:
            return
        assert isinstance(self._scorer, PairScorer), "only a model of this process is trained"
        passes = self._scorer.passes(items)
        for number, compute in enumerate(passes, start=1):
            places, found = self._update.forward(compute)
            loss = self._loss(found.margins_N, self._beta).sum() / len(items)
            self._update.backward(loss, last=number == len(passes))
            yield places, found


def _no_evidence(failure: Failure) -> PreferenceSummary:
    return summarize_claims(failure.user_id, (), Provenance(author=Author.INFERRED))


def _summary_metrics(
    replies: Sequence[PreferenceSummary | Failure], summaries: Sequence[PreferenceSummary]
) -> dict[str, float]:
    """The share of replies that are not summaries, and of summaries without a claim, which include them."""
    failed = sum(isinstance(reply, Failure) for reply in replies)
    empty = sum(summary.status == "not_enough_evidence" for summary in summaries)
    return {"summaries/failed": failed / len(replies), "summaries/not_enough_evidence": empty / len(replies)}


def _trained(users: Sequence[int], chosen: Sequence[Sequence[HeldOutPair]]) -> list[int]:
    """Places of the items that the generator is trained on: the n-th pair under the n-th summary of a user."""
    seen: Counter[int] = Counter()
    places, first = [], 0
    for user, pairs in zip(users, chosen, strict=True):
        places.append(first + seen[user] % len(pairs))
        seen[user] += 1
        first += len(pairs)
    return places
