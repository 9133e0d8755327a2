"""The two endpoints of an OpenAI-compatible server: chat completions of messages, and completions of token ids."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from popi.backends.base import ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult
from popi.backends.remote.client import Client
from popi.backends.remote.failures import Malformed, Rejected
from popi.backends.remote.fields import Fields
from popi.backends.remote.reply import Reply
from popi.backends.remote.wire import Chunk, read
from popi.backends.results import scored
from popi.backends.together import closing
from popi.errors import BackendError
from popi.io import writable

if TYPE_CHECKING:
    from popi.engine.chat_tokens import ChatTokens, Rendered


@dataclass(frozen=True, slots=True)
class Prepared:
    """The arguments of a request, or why it cannot be sent."""

    arguments: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    error: str | None = None


class Endpoint(ABC):
    """A way to use a server. Failures are exceptions, which :func:`popi.backends.remote.failures.failed` reads.

    Args:
        model: The server's name of the model.
        fields: Names of the request fields.

    Attributes:
        path: Path of the endpoint, below the base URL.
        scores: Whether it returns log-probabilities of a given response.
        response_prefix: Whether it continues a response prefix.
    """

    path: str
    scores = False
    response_prefix = False

    def __init__(self, model: str, fields: Fields) -> None:
        self._model, self._fields, self._opened = model, fields, False

    async def chat(self, client: Client, request: ChatRequest) -> ChatResult:
        """Continues a conversation."""
        prepared = self._prepare(request)
        if prepared.error is not None:
            return ChatResult.failed(prepared.error, "request", model=self._model, prompt_tokens=prepared.prompt_tokens)
        reply = Reply(request, self._model, opened=self._opened)
        async with closing(self._bodies(client, prepared.arguments)) as bodies:
            async for body in bodies:
                reply.add(body)
        reply.finish()
        return self._counted(reply.result(), prepared)

    async def stream(self, client: Client, request: ChatRequest, on_complete: OnComplete) -> AsyncIterator[str]:
        """Continues a conversation, and yields the text in pieces."""
        prepared = self._prepare(request)
        if prepared.error is not None:
            raise BackendError(f"{self._model}: {prepared.error}", failure="request")
        reply = Reply(request, self._model, opened=self._opened)
        arguments = {**prepared.arguments, "stream": True, "stream_options": {"include_usage": True}}
        async with closing(self._bodies(client, arguments)) as bodies:
            async for body in bodies:
                if piece := reply.add(body):
                    yield piece
        if piece := reply.finish():
            yield piece
        on_complete(self._counted(reply.streamed(), prepared))

    @abstractmethod
    async def score(self, client: Client, request: ScoreRequest) -> ScoreResult:
        """Scores a response."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a plain text."""

    @abstractmethod
    def _prepare(self, request: ChatRequest) -> Prepared:
        """Makes the arguments of a request."""

    def _counted(self, result: ChatResult, prepared: Prepared) -> ChatResult:
        """Adds the token counts that are known here."""
        return result

    async def _bodies(self, client: Client, arguments: dict[str, Any]) -> AsyncIterator[Any]:
        """Sends a request, and yields the bodies of the response. Retries if the server rejects a field."""
        attempt, begun = self._fields.attempt(arguments), False
        while not begun:
            try:
                async with closing(client.bodies(self.path, attempt.body())) as bodies:
                    async for body in bodies:
                        attempt.accepted()
                        begun = True
                        yield body
            except Rejected as error:
                if begun:
                    raise
                attempt.rejected(error)


class ByMessages(Endpoint):
    """Chat completions: the server renders the conversation. Any server has this endpoint."""

    path = "/chat/completions"

    async def score(self, client: Client, request: ScoreRequest) -> ScoreResult:
        """Raises an error: scoring needs the token ids of the response."""
        raise BackendError(
            f"{self._model}: scoring needs the model's tokenizer, and a server with the completions endpoint; "
            "set the option tokenizer",
            failure="denied",
        )

    def count_tokens(self, text: str) -> int:
        """Estimates the tokens of a text: one for four ASCII characters, and one for each other character."""
        narrow = sum(char.isascii() for char in text)
        return math.ceil(narrow / 4) + len(text) - narrow

    def _prepare(self, request: ChatRequest) -> Prepared:
        if request.response_prefix:
            return Prepared(
                error="a response prefix needs the model's tokenizer, and a server with the completions endpoint; "
                "set the option tokenizer"
            )
        messages = [{"role": turn.role, "content": writable(turn.content)} for turn in request.messages]
        return Prepared({"model": self._model, "messages": messages, **_sampling(request)})


class ByTokenIds(Endpoint):
    """Completions of token ids: conversations are rendered here, as in training.

    For a server of an open model that has this endpoint. Log-probabilities are those of a prompt that it echoes.

    Args:
        model: The server's name of the model.
        fields: Names of the request fields.
        tokens: The model's tokenizer.
        context: Maximum number of tokens of a request and its response, if known.
        scores: Whether the server echoes log-probabilities.
    """

    path = "/completions"
    response_prefix = True

    def __init__(self, model: str, fields: Fields, tokens: ChatTokens, *, context: int | None, scores: bool) -> None:
        super().__init__(model, fields)
        self._tokens, self._context, self.scores = tokens, context, scores
        self._opened = tokens.opens_reasoning

    async def score(self, client: Client, request: ScoreRequest) -> ScoreResult:
        """Scores a response: the server echoes it with its conversation, and generates nothing."""
        if not self.scores:
            raise BackendError(f"{self._model}: scoring is turned off by the option scores", failure="denied")
        [response] = self._tokens.encode_responses([request.response])
        prompt = self._render(request, len(response), answered=True)
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ScoreResult.failed(prompt.error, "request", model=self._model, prompt_tokens=length)
        arguments = {
            "model": self._model,
            "prompt": [*prompt.tokens, *response],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 0,
        }
        async with closing(self._bodies(client, arguments)) as bodies:
            chunk = read(Chunk, await anext(bodies))
        echoed = chunk.first.logprobs if chunk.first else None
        if echoed is None or not echoed.token_logprobs:
            raise BackendError(
                f"{self._model}: the server does not echo log-probabilities of a prompt; set the option scores: false",
                failure="denied",
            )
        logprobs = echoed.token_logprobs[length : length + len(response)]
        known = [logprob for logprob in logprobs if logprob is not None]
        if len(known) < len(response):
            raise Malformed("log-probabilities of the response are missing")
        return scored(sum(known), len(response), model=self._model, prompt_tokens=length)

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a plain text, without special tokens."""
        return len(self._tokens.encode([text])[0])

    def _prepare(self, request: ChatRequest) -> Prepared:
        prefix = self._tokens.encode([request.response_prefix])[0] if request.response_prefix else []
        prompt = self._render(request, len(prefix) + 1 if request.max_tokens > 0 else 0)
        length = len(prompt.tokens) + len(prefix)
        if prompt.error is not None:
            return Prepared(prompt_tokens=length, error=prompt.error)
        room = request.max_tokens if self._context is None else self._context - length
        arguments = {
            "model": self._model,
            "prompt": [*prompt.tokens, *prefix],
            **_sampling(request),
            "max_tokens": min(request.max_tokens, room),
            "stop_token_ids": sorted(self._tokens.end_tokens),
        }
        return Prepared(arguments, length)

    def _counted(self, result: ChatResult, prepared: Prepared) -> ChatResult:
        completion = result.completion_tokens or self.count_tokens(result.text)
        return replace(result, prompt_tokens=prepared.prompt_tokens, completion_tokens=completion)

    def _render(self, request: ChatRequest | ScoreRequest, needed: int, *, answered: bool = False) -> Rendered:
        from popi.engine.admission import admitted

        return admitted(self._tokens, [request.messages], [needed], self._context, answered=answered)[0]


def _sampling(request: ChatRequest) -> dict[str, Any]:
    """The fields that decide how a response is sampled. Fields without effect are left out."""
    arguments: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": request.temperature}
    if request.temperature > 0 and request.top_p < 1:
        arguments["top_p"] = request.top_p
    if request.temperature > 0 and request.seed is not None:
        arguments["seed"] = request.seed
    if request.stop:
        arguments["stop"] = list(request.stop)
    return arguments
