"""What a generator is told of users in training: summaries by the writer, their raw signals, or nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

from popi import registry
from popi.backends.base import Backend
from popi.backends.ledger import Ledger, Price
from popi.backends.wrappers.cost import Cost
from popi.data.example import PersonalizationExample
from popi.roles import PreferenceInference
from popi.training.pair import Pair
from popi.training.seeds import seed_of

Kind = Literal["summary", "raw-signals", "none"]


class Contexts:
    """Tells a generator of users.

    Args:
        kind: What it is told.
        pair: The writer of the summaries, and the generator.
        max_tokens: The most tokens of a summary.
        seed: Of the run.
    """

    def __init__(self, kind: Kind, pair: Pair, *, max_tokens: int, seed: int) -> None:
        self._kind, self._pair = kind, pair
        self._max_tokens, self._seed = max_tokens, seed

    def check(self, users: Sequence[PersonalizationExample]) -> None:
        """Refuses a pair that is too long now, and not at the first look or in the middle of a run.

        Raises:
            InputError: If there is one.
        """
        if self._kind == "summary":
            self._pair.scorer.check(users, [""] * len(users), longest=self._max_tokens)
        else:
            self._pair.scorer.check(users, _told(users, self.inference()))

    def inference(self) -> PreferenceInference | None:
        """What tells the generator of users who are not learned from, or ``None`` if nothing does."""
        return self._inference(self._pair.writer_backend, temperature=0.0, purpose="look")

    def sampled(
        self, users: Sequence[PersonalizationExample], *, temperature: float, purpose: str
    ) -> tuple[list[str | None], dict[str, float]]:
        """What the generator is told of users under contexts that stay as they are.

        Args:
            users: The users.
            temperature: Of the sampling of summaries.
            purpose: The same one samples the same.

        Returns:
            What it is told of each, and what sampling it took: ``tokens/rollout`` and ``seconds/rollout``.
        """
        ledger, began = Ledger(), time.perf_counter()
        writer = Cost(self._pair.writer_backend, price=Price(), ledger=ledger)
        told = _told(users, self._inference(writer, temperature=temperature, purpose=purpose))
        if self._kind != "summary":
            return told, {}
        seconds = time.perf_counter() - began
        return told, {"tokens/rollout": float(ledger.total.completion_tokens), "seconds/rollout": seconds}

    def _inference(self, writer: Backend, *, temperature: float, purpose: str) -> PreferenceInference | None:
        if self._kind == "none":
            return None
        if self._kind == "raw-signals":
            return registry.make_inference("raw", self._pair.generator_backend)
        options = {"max_tokens": self._max_tokens, "temperature": temperature}
        return registry.make_inference("llm", writer, **options, seed=seed_of(self._seed, purpose))


def _told(users: Sequence[PersonalizationExample], inference: PreferenceInference | None) -> list[str | None]:
    if inference is None:
        return [None] * len(users)
    return [summary.text for summary in asyncio.run(inference.infer([example.user for example in users]))]
