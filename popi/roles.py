"""The two roles: what infers a summary, and what generates under one. Any backend can play either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from popi.backends.base import Backend, ChatResult, OnComplete, ScoreResult, ignore_result
from popi.errors import ConfigError, ModelError
from popi.prompts import Message
from popi.signals import UserSignals
from popi.summary import PreferenceSummary

DEFAULT_CONTEXT_TOKENS = 4096
"""The most tokens of signals, or of a summary, that a model is shown unless it is told otherwise."""

TEMPLATE_TOKENS = 64
"""Room for what a chat template adds around the words of a conversation, by judgement."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a user has no summary, in one line."""

    user_id: str
    error: str


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
            BackendError: If the model behind it cannot serve, or a user's summary cannot be had.
        """

    async def try_infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary | Failure]:
        """Writes one summary a user, in order; a user for whom there is none is data in its place.

        Raises:
            BackendError: If the model behind it cannot serve at all.
        """
        return list(await self.infer(users))


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
    def stream(self, item: Conditioned, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Answers one prompt, piece by piece.

        Args:
            item: The prompt.
            on_complete: Told the whole answer in the end, as :meth:`respond` gives it.

        Raises:
            BackendError: If the answer cannot be had or breaks off.
        """

    @abstractmethod
    async def score(self, items: Sequence[Candidate]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, in nats.

        Raises:
            BackendError: If the model behind it cannot serve or cannot score.
        """


def context_tokens(backend: Backend, frame: Sequence[Message], max_tokens: int, asked: int | None = None) -> int:
    """The most tokens of signals, or of a summary, that a model is shown inside a frame.

    Args:
        backend: The model's.
        frame: The conversation around them.
        max_tokens: Room for the reply.
        asked: A limit of one's own; ``None`` takes what there is room for, up to ``DEFAULT_CONTEXT_TOKENS``.

    Raises:
        ConfigError: If what is asked is not positive or is more than there is room for.
        ModelError: If there is no room at all.
    """
    if asked is not None and asked <= 0:
        raise ConfigError(f"the token budget must be positive, not {asked}")
    window = backend.capabilities.context_length
    if window is None:
        return asked or DEFAULT_CONTEXT_TOKENS
    around = sum(backend.count_tokens(message.content) for message in frame)
    room = window - max_tokens - around - TEMPLATE_TOKENS
    if room <= 0:
        raise ModelError(
            f"the {window} tokens of {backend.model} leave no room beside a reply of {max_tokens}",
            fix="ask for a shorter reply or take a model with a longer context",
        )
    if asked is not None and asked > room:
        raise ConfigError(
            f"a budget of {asked} tokens is more than the {room} that {backend.model} has room for",
            fix=f"ask for at most {room}",
        )
    return asked or min(room, DEFAULT_CONTEXT_TOKENS)
