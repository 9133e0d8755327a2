"""The interface between roles and models: requests, results and the capabilities of a backend."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from popi.prompts import Message

FinishReason = Literal["stop", "length", "refused", "filtered", "error"]

InterfaceKind = Literal["summary", "embedding"]
"""The kinds of :data:`popi.interface.Interface`."""

FailureKind = Literal[
    "request",
    "denied",
    "rate_limit",
    "timeout",
    "unreachable",
    "server",
    "malformed",
    "empty",
    "budget",
    "withheld",
]
"""Why an item failed.

- ``request``: the model does not support this request.
- ``denied``: the key, the account or the model name was rejected; every other request would fail too.
- ``rate_limit``: too many requests.
- ``timeout``: no response within the time limit.
- ``unreachable``: the connection failed or broke.
- ``server``: the server failed.
- ``malformed``: malformed response.
- ``empty``: the response has no text, for example because reasoning used up ``max_tokens``.
- ``budget``: the request might exceed the budget and was not sent.
- ``withheld``: a stream ended in a refusal or was stopped by a content filter. Without streaming this is a finish
  reason, not a failure.
"""

TRANSIENT: frozenset[FailureKind] = frozenset({"rate_limit", "timeout", "unreachable", "server", "malformed"})
"""Transient failures: the same request may succeed later."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to continue.

    Example:
        >>> request = ChatRequest([Message("user", "What is tea?")], max_tokens=64, temperature=0.7, seed=1)
        >>> request.messages[-1].content, request.stop
        ('What is tea?', ())

    Attributes:
        messages: The conversation. The last turn is not the assistant's.
        max_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus sampling threshold.
        seed: Seed for sampling. The result does not depend on the batch. ``None`` draws a random seed.
        stop: Strings that end the response. They are not part of it.
        response_prefix: Text that the response starts with: the model continues it. It is part of ``ChatResult.text``.
            Needs ``Capabilities.response_prefix``.
        user: The user whose account is charged. It is not sent to the model.
    """

    messages: Sequence[Message]
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    response_prefix: str = ""
    user: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatResult:
    """A response, or the error of a failed request.

    Attributes:
        text: The response. Empty only if the item failed or the model refused.
        finish_reason: ``stop``; ``length`` if ``max_tokens`` was reached; ``refused`` if the model refused;
            ``filtered`` if a content filter removed the response or its end; ``error`` for any other failure.
        prompt_tokens: Length of the rendered conversation.
        completion_tokens: Number of new tokens, including the end token.
        model: The model that responded.
        error: One line, or ``None``. Also set for ``refused`` and ``filtered``.
        failure: The kind of failure; ``None`` for a success, and for ``refused`` and ``filtered``.
        retry_after: Seconds to wait before a retry, if the server sent them.
        route: The route that served the request, if there are several.
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
        """Makes the result of a failed item."""
        return cls("", "error", prompt_tokens, 0, model, error, failure, retry_after)


OnComplete = Callable[[ChatResult], None]
"""Called once at the end of a stream, with the result that ``chat`` would return."""


def ignore_result(result: ChatResult) -> None:
    """The default ``on_complete``: does nothing."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A response to score under a conversation.

    Example:
        >>> request = ScoreRequest([Message("user", "What is tea?")], "A drink.")
        >>> request.response
        'A drink.'

    Attributes:
        messages: The conversation. The last turn is not the assistant's.
        response: The response that follows it.
        user: As in :class:`ChatRequest`.
    """

    messages: Sequence[Message]
    response: str
    user: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """A score, or the error of a failed request.

    Attributes:
        logprob: Sum over the tokens of the response and its end of turn, in nats. Always finite unless the item failed.
        tokens: Number of tokens in the sum.
        prompt_tokens: Length of the rendered conversation.
        model: The model that scored the response.
        error: One line, or ``None``. If set, ``logprob`` is NaN.
        failure: The kind of failure.
        retry_after: Seconds to wait before a retry, if the server sent them.
        route: The route that served the request, if there are several.
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
        """Makes the result of a failed item."""
        return cls(math.nan, 0, prompt_tokens, model, error, failure, retry_after)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The features of a backend.

    Example:
        >>> capabilities = Capabilities(score=True, context_length=8192)
        >>> capabilities.stream, capabilities.response_prefix, sorted(capabilities.interfaces)
        (True, False, ['summary'])

    Attributes:
        stream: Whether text arrives in pieces while it is generated.
        score: Whether given responses can be scored.
        context_length: Maximum number of tokens of a conversation and its response; ``None`` if unknown.
        response_prefix: Whether a response can be made to start with a given text.
        interfaces: The kinds of interface that a generator on this backend accepts.
    """

    stream: bool = True
    score: bool = False
    context_length: int | None = None
    response_prefix: bool = False
    interfaces: frozenset[InterfaceKind] = frozenset({"summary"})


class Backend(ABC):
    """Turns messages into text, and text into log-probabilities, in batches.

    A failed item is data in its result. A backend that is not available raises :class:`popi.errors.BackendError`.
    Results are in the order of the requests. A backend is an asynchronous context manager; leaving the block closes it.

    Example:
        A backend needs four methods:

        >>> import asyncio
        >>> class UpperCase(Backend):
        ...     model = "upper-case"
        ...     capabilities = Capabilities()
        ...
        ...     async def chat(self, requests):
        ...         return [ChatResult(request.messages[-1].content.upper(), "stop") for request in requests]
        ...
        ...     async def stream(self, request, on_complete=ignore_result):
        ...         [result] = await self.chat([request])
        ...         yield result.text
        ...         on_complete(result)
        ...
        ...     async def score(self, requests):
        ...         return [ScoreResult.failed("not supported", "request", model=self.model) for request in requests]
        ...
        ...     def count_tokens(self, text):
        ...         return len(text.split())
        >>> [result] = asyncio.run(UpperCase().chat([ChatRequest([Message("user", "Hello")])]))
        >>> result.text
        'HELLO'

    Attributes:
        model: Name of the model, used in provenance and tables.
        capabilities: The features of this backend.
    """

    model: str
    capabilities: Capabilities

    @property
    def identity(self) -> str:
        """Identifies everything that determines a response: address, weights, dtype and tokenizer.

        Two backends with the same identity give the same response to the same request. Caches use it as a key.
        """
        return self.model

    @abstractmethod
    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the backend as a whole is not available.
        """

    @abstractmethod
    def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation. The concatenated pieces equal the text that ``chat`` returns.

        Args:
            request: The conversation.
            on_complete: Called with the whole result after the last piece. It is not called if the stream fails or is
                closed early.

        Raises:
            BackendError: If the request fails or the stream breaks.
        """

    @abstractmethod
    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Scores each response, including its end of turn, given its conversation.

        Raises:
            BackendError: If the backend as a whole is not available, or does not support scoring.
        """

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a plain text with the model's tokenizer, without special tokens."""

    async def close(self) -> None:
        """Releases all resources. May be called more than once."""
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
