"""What a summary earns: the loss of held-out pairs under it, which may teach the generator in the same pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from popi.data.example import HeldOutPair
from popi.seeds import seed_of
from popi.summary import PreferenceSummary
from popi.training.generator import GeneratorUpdate, check_finite, margin_figures
from popi.training.objective import LOSSES, Loss, rewards
from popi.training.scoring import Judged, PairScorer, Reference


class PairReward:
    """Rewards summaries by the preference objective; an instance is a ``popi.training.writer.Earn``.

    All summaries of a user in a step are judged by the same pairs. The generator, where it learns, learns from one of
    them under each summary, each in its turn: a judgement costs a third of a lesson, and what a step needs is judges.

    Args:
        scorer: Scores with the generator.
        pairs: The held-out pairs of each user.
        reference: Of these pairs.
        loss: The objective.
        beta: Its temperature in the generator's loss.
        reward_beta: Its temperature in the reward.
        pairs_per_summary: How many of a user's pairs judge a summary.
        token_price: What a token that the generator is told costs.
        seed: Of the run.
        update: Updates the generator by the gradient of its loss on the same margins.
        keep_gradient: Leave that gradient to an update that comes later, where the writer has the same weights.
    """

    def __init__(
        self,
        scorer: PairScorer,
        pairs: Sequence[Sequence[HeldOutPair]],
        reference: Reference,
        *,
        loss: Loss,
        beta: float,
        reward_beta: float,
        pairs_per_summary: int,
        token_price: float,
        seed: int,
        update: GeneratorUpdate | None = None,
        keep_gradient: bool = False,
    ) -> None:
        self._scorer, self._pairs, self._reference = scorer, pairs, reference
        self._loss, self._beta, self._reward_beta = LOSSES[loss], beta, reward_beta
        self._count, self._price, self._seed = pairs_per_summary, token_price, seed
        self._update, self._keep_gradient = update, keep_gradient

    def __call__(
        self, users: list[int], summaries: list[PreferenceSummary], tokens: list[int], step: int
    ) -> tuple[list[float], dict[str, float]]:
        """Rewards each summary, in nats, and tells of the pairs that judged them.

        Raises:
            PopiError: If a loss or the norm of a gradient is no number.
        """
        judges = [self._judges(user, step) for user in users]
        items = [
            Judged(summary.text, pair, self._reference[pair])
            for summary, pairs in zip(summaries, judges, strict=True)
            for pair in pairs
        ]
        read = self._scorer.tokens
        learns = self._update is not None or self._keep_gradient
        margins = self._score(items, _lessons(users, judges) if learns else [])
        loss = self._loss(margins, self._beta).mean().item()
        check_finite("the loss", loss, step)
        figures = margin_figures(margins, loss)
        figures["tokens/scoring"] = float(self._scorer.tokens - read)
        if self._update is not None:
            figures["generator_grad_norm"] = self._update(step)
        by_summary = self._loss(margins, self._reward_beta).split([len(pairs) for pairs in judges])
        earned = [
            rewards(part, torch.tensor(float(length)), self._price).item()
            for part, length in zip(by_summary, tokens, strict=True)
        ]
        return earned, figures

    def _judges(self, user: int, step: int) -> list[HeldOutPair]:
        pairs = self._pairs[user]
        rng = np.random.default_rng(seed_of(self._seed, "pairs", step, user))
        return [pairs[place] for place in rng.permutation(len(pairs))[: self._count]]

    def _score(self, items: Sequence[Judged], lessons: Sequence[int]) -> torch.Tensor:
        """Margins: (items,); the gradient of the mean loss of the lessons among them is collected."""
        margins = torch.zeros(len(items), dtype=torch.float64)
        for chosen, margins_N in self._scorer.passes([items[place] for place in lessons]):
            (self._loss(margins_N, self._beta).sum() / len(lessons)).backward()
            margins[[lessons[index] for index in chosen]] = margins_N.detach().cpu()
        others = sorted(set(range(len(items))) - set(lessons))
        margins[others] = self._scorer.margins([items[place] for place in others])
        return margins


def _lessons(users: Sequence[int], judges: Sequence[Sequence[HeldOutPair]]) -> list[int]:
    """Which of the items teach: of the pairs under the n-th summary of a user, the n-th."""
    seen: Counter[int] = Counter()
    lessons, first = [], 0
    for user, pairs in zip(users, judges, strict=True):
        lessons.append(first + seen[user] % len(pairs))
        seen[user] += 1
        first += len(pairs)
    return lessons
