"""The two roles: what infers a summary, and what generates under one. Any backend can play either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from popi.backends.base import ChatResult, ScoreResult
from popi.signals import UserSignals
from popi.summary import PreferenceSummary


class PreferenceInference(ABC):
    """Reads users' signals and writes their summaries, q(z | s). It never sees a prompt.

    Attributes:
        name: Names it in tables and provenance.
    """

    name: str

    @abstractmethod
    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """Writes one summary a user, in order.

        Raises:
            BackendError: If the model behind it cannot serve.
        """


@dataclass(frozen=True, slots=True)
class Conditioned:
    """A prompt and the summary to answer it under; ``None`` is the bare prompt."""

    prompt: str
    summary: PreferenceSummary | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response whose probability under a conditioned prompt is asked."""

    given: Conditioned
    response: str


class ConditionedGenerator(ABC):
    """Answers prompts under summaries, pi(y | x, z).

    Attributes:
        name: Names it in tables.
    """

    name: str

    @abstractmethod
    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        """Answers each prompt.

        Raises:
            BackendError: If the model behind it cannot serve.
        """

    @abstractmethod
    def stream(self, item: Conditioned) -> AsyncIterator[str]:
        """Answers one prompt, piece by piece.

        Raises:
            BackendError: If the answer cannot be had or breaks off.
        """

    @abstractmethod
    async def score(self, items: Sequence[Candidate]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, in nats.

        Raises:
            BackendError: If the model behind it cannot serve or cannot score.
        """
