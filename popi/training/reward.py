"""What a summary earns: the loss of held-out pairs under it, which may teach the generator in the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from popi.data.example import TestPair
from popi.summary import PreferenceSummary
from popi.training.generator import GeneratorUpdate, check_finite, note_margins
from popi.training.objective import LOSSES, Loss, rewards
from popi.training.scoring import Judged, PairScorer, Reference
from popi.training.seeds import seed_of


class PairReward:
    """Rewards summaries by the preference objective; an instance is a ``popi.training.writer.Earn``.

    All summaries of a user in a step are judged by the same pairs.

    Args:
        scorer: Scores with the generator.
        pairs: The held-out pairs of each user.
        reference: Of these pairs.
        loss: The objective.
        beta: Its temperature.
        pairs_per_summary: How many of a user's pairs judge a summary.
        token_price: What a token of a summary costs.
        seed: Of the run.
        update: Updates the generator by the gradient of the same losses.
        keep_gradient: Leave that gradient to an update that comes later, where the writer has the same weights.

    Attributes:
        seen: What was measured since it was last cleared.
    """

    def __init__(
        self,
        scorer: PairScorer,
        pairs: Sequence[Sequence[TestPair]],
        reference: Reference,
        *,
        loss: Loss,
        beta: float,
        pairs_per_summary: int,
        token_price: float,
        seed: int,
        update: GeneratorUpdate | None = None,
        keep_gradient: bool = False,
    ) -> None:
        self._scorer, self._pairs, self._reference = scorer, pairs, reference
        self._loss, self._beta = LOSSES[loss], beta
        self._count, self._price, self._seed = pairs_per_summary, token_price, seed
        self._update, self._keep_gradient = update, keep_gradient
        self.seen: dict[str, list[float]] = {}

    def __call__(
        self, users: list[int], summaries: list[PreferenceSummary], tokens: list[int], step: int
    ) -> list[float]:
        """Rewards each summary, in nats."""
        judges = [self._judges(user, step) for user in users]
        items = [
            Judged(summary.text, pair, self._reference[pair])
            for summary, pairs in zip(summaries, judges, strict=True)
            for pair in pairs
        ]
        losses = self._losses(items, step)
        ends = np.cumsum([len(pairs) for pairs in judges]).tolist()
        by_summary = [losses[end - len(pairs) : end] for end, pairs in zip(ends, judges, strict=True)]
        return [
            float(rewards(part[None, None], torch.tensor([[float(length)]]), self._price))
            for part, length in zip(by_summary, tokens, strict=True)
        ]

    def _judges(self, user: int, step: int) -> list[TestPair]:
        pairs = self._pairs[user]
        rng = np.random.default_rng(seed_of(self._seed, "pairs", step, user))
        return [pairs[place] for place in rng.permutation(len(pairs))[: self._count]]

    def _losses(self, items: Sequence[Judged], step: int) -> torch.Tensor:
        """The loss of each item; the gradient of their mean is followed, kept or not taken at all."""
        learns = self._update is not None or self._keep_gradient
        found, margins = torch.zeros(len(items)), torch.zeros(len(items))
        with torch.set_grad_enabled(learns):
            for chosen, margins_N in self._scorer.passes(items):
                losses_N = self._loss(margins_N, self._beta)
                if learns:
                    (losses_N.sum() / len(items)).backward()
                found[chosen], margins[chosen] = losses_N.detach().cpu(), margins_N.detach().cpu()
        check_finite(found.mean().item(), step)
        self.seen.setdefault("generator_loss", []).append(found.mean().item())
        note_margins(self.seen, margins)
        if self._update is not None:
            self.seen.setdefault("generator_grad_norm", []).append(self._update())
        return found
