"""The scorer of a generator that is not in this process: a backend, such as a client of vLLM servers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import torch

from popi.backends.base import Backend, ScoreRequest, ScoreResult
from popi.data.example import PersonalizationExample
from popi.errors import BackendError, ConfigError
from popi.interface import Interface
from popi.roles import AnswerFormat
from popi.training.objective import LogRatios, Reduction
from popi.training.scoring import ConditionedPair

AT_ONCE = 1024
"""Number of responses in a call of the backend."""


class ServedScorer:
    """Scores pairs with a backend, without gradients. It is a :class:`popi.training.scoring.Scorer`.

    Args:
        backend: The backend of the generator. Retries and time limits are its own.
        format: Renders the prompts, as in serving.
        reduction: How the log-probabilities of a response's tokens are reduced.

    Raises:
        ConfigError: If the backend does not score responses.

    Attributes:
        format: Renders the prompts.
        reduction: As given.
        tokens_read: Number of tokens that the backend has read so far.
    """

    def __init__(self, backend: Backend, format: AnswerFormat, *, reduction: Reduction = "sum") -> None:
        if not backend.capabilities.score:
            fix = "name a backend that returns the log-probabilities of given responses, such as a vLLM server"
            raise ConfigError(f"{backend.model} does not score responses", field="generator.model", fix=fix)
        self._backend = backend
        # A client's connections belong to its event loop.
        self._loop = asyncio.Runner()
        self._failure = BackendError("cannot score a pair")
        self.format, self.reduction, self.tokens_read = format, reduction, 0

    def check(
        self, users: Sequence[PersonalizationExample], interfaces: Sequence[Interface | None], *, reserve: int = 0
    ) -> None:
        """Does nothing: the backend knows its context, and its format cuts summaries that do not fit."""

    def ratios(self, items: Sequence[ConditionedPair]) -> LogRatios:
        """Scores all items, in order; double precision, on the CPU.

        Raises:
            BackendError: If a response cannot be scored.
        """
        found, scored = self.try_ratios(items)
        if not all(scored):
            raise self._failure
        return found

    def try_ratios(self, items: Sequence[ConditionedPair]) -> tuple[LogRatios, list[bool]]:
        """Scores the items, and returns which of them were scored. The ratios of the others are NaN.

        Raises:
            BackendError: If no item was scored.
        """
        requests = [
            ScoreRequest(self.format.render(item.pair.prompt, item.interface), response)
            for item in items
            for response in (item.pair.chosen, item.pair.rejected)
        ]
        scores: list[ScoreResult] = []
        for start in range(0, len(requests), AT_ONCE):
            scores += self._loop.run(self._backend.score(requests[start : start + AT_ONCE]))
        logps_N_2 = torch.tensor([self._reduced(score) for score in scores], dtype=torch.float64).view(-1, 2)
        references_N_2 = torch.tensor([item.reference for item in items], dtype=torch.float64).view(-1, 2)
        ratios = LogRatios(*(logps_N_2 - references_N_2).unbind(dim=1))
        scored = ratios.margins_N.isfinite().tolist()
        if items and not any(scored):
            raise self._failure
        return ratios, scored

    def close(self) -> None:
        """Closes the backend."""
        self._loop.run(self._backend.close())
        self._loop.close()

    def _reduced(self, score: ScoreResult) -> float:
        if score.error is not None:
            self._failure = BackendError(f"cannot score a pair: {score.error}", failure=score.failure)
            return math.nan
        self.tokens_read += score.prompt_tokens + score.tokens
        return score.logprob if self.reduction == "sum" else score.logprob / score.tokens
