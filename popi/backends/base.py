"""The seam between roles and models: what a backend is asked, what it answers, what it can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from popi.prompts import Message

FinishReason = Literal["stop", "length", "refused", "filtered", "error"]

FailureKind = Literal[
    "request", "denied", "rate_limit", "timeout", "unreachable", "server", "malformed", "budget", "withheld"
]
"""Why an item has failed.

``request``: it cannot be served as it stands, by this model at least. ``denied``: nor can any other, for the key, the
model or the account. ``rate_limit``: not now. ``timeout``: not in time. ``unreachable``: nobody answered, or the
connection broke. ``server``: the server failed. ``malformed``: what came back is no answer. ``budget``: it might have
cost more than may be spent, and was not sent. ``withheld``: a stream ended in a refusal or by a content filter; an
answer that is no stream tells that by how it ended, and has not failed.
"""

PASSING: frozenset[FailureKind] = frozenset({"rate_limit", "timeout", "unreachable", "server", "malformed"})
"""Failures that may be gone when the same is asked again; asking again changes nothing but the cost."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to be continued.

    Attributes:
        messages: The conversation; the last turn is not the assistant's.
        max_tokens: The most new tokens.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling.
        seed: Seeds the sampling of this request, whatever it is batched with; ``None`` draws a seed.
        stop: Texts that end the answer and are not part of it.
        user: For whom it is, in the accounts alone: no model is told.
    """

    messages: Sequence[Message]
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    user: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatResult:
    """An answer, or why there is none.

    Attributes:
        text: The new text.
        finish_reason: ``length`` when it was cut by ``max_tokens``; ``refused`` when the model would not answer and
            ``filtered`` when the server withheld the answer, ``error`` when there is none for another reason:
            ``error`` says more of these three.
        prompt_tokens: Length of the rendered conversation.
        completion_tokens: Number of new tokens, end token included.
        model: The model that served it.
        error: One line, or ``None``.
        failure: Of what kind the error is; ``None`` if there is none, or the model itself withheld the answer.
        retry_after: After how many seconds the server wants to be asked again, if it said so.
        route: By which of several backends it was served, where there was a choice.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""
    error: str | None = None
    failure: FailureKind | None = None
    retry_after: float | None = None
    route: str = ""

    @classmethod
    def failed(
        cls,
        error: str,
        failure: FailureKind,
        *,
        model: str,
        prompt_tokens: int = 0,
        retry_after: float | None = None,
    ) -> Self:
        """An item that failed."""
        return cls("", "error", prompt_tokens, 0, model, error, failure, retry_after)


Ended = Callable[[ChatResult], None]
"""Told how a stream has ended: with the whole answer, as ``chat`` gives it."""


def unheard(result: ChatResult) -> None:
    """For those who want the pieces alone."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A response whose probability under a conversation is asked.

    Attributes:
        messages: The conversation; the last turn is not the assistant's.
        response: What follows it.
        user: As in :class:`ChatRequest`.
    """

    messages: Sequence[Message]
    response: str
    user: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """A score, or why there is none.

    Attributes:
        logprob: Sum over the tokens of the response and the end of its turn, in nats.
        tokens: The number of tokens in that sum.
        prompt_tokens: Length of the rendered conversation in front.
        model: The model that served it.
        error: One line, or ``None``; then ``logprob`` is NaN.
        failure: Of what kind the error is.
        retry_after: After how many seconds the server wants to be asked again, if it said so.
        route: By which of several backends it was served, where there was a choice.
    """

    logprob: float
    tokens: int
    prompt_tokens: int = 0
    model: str = ""
    error: str | None = None
    failure: FailureKind | None = None
    retry_after: float | None = None
    route: str = ""

    @classmethod
    def failed(
        cls,
        error: str,
        failure: FailureKind,
        *,
        model: str,
        prompt_tokens: int = 0,
        retry_after: float | None = None,
    ) -> Self:
        """An item that failed."""
        return cls(math.nan, 0, prompt_tokens, model, error, failure, retry_after)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        stream: Whether text comes in pieces as it is made.
        score: Whether log-probabilities of a given response can be had.
        context_length: The most tokens of a conversation and its answer, or ``None`` if it is not known.
    """

    stream: bool = True
    score: bool = False
    context_length: int | None = None


class Backend(ABC):
    """Moves messages to text and text to log-probabilities, in batches.

    An item that fails is data in its result; a backend that is dead raises :class:`popi.errors.BackendError`.
    Results come in the order of the requests. A backend is an asynchronous context manager that closes itself.

    Attributes:
        model: The name of the model, as it stands in provenance and tables.
        capabilities: What this backend can do.
    """

    model: str
    capabilities: Capabilities

    @abstractmethod
    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the backend as a whole cannot serve.
        """

    @abstractmethod
    def stream(self, request: ChatRequest, ended: Ended = unheard) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece; the pieces joined are the text that ``chat`` gives.

        Args:
            request: The conversation.
            ended: Told, once the last piece was taken, the whole answer with its tokens and how it ended. Of a stream
                that is left or breaks off it hears nothing.

        Raises:
            BackendError: If the answer cannot be had or breaks off.
        """

    @abstractmethod
    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, end of turn included, given its conversation.

        Raises:
            BackendError: If the backend as a whole cannot serve, or cannot score at all.
        """

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """The length of a bare text by this model's tokenizer, without special tokens."""

    async def close(self) -> None:
        """Releases what the backend holds. Closing twice is harmless."""
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
