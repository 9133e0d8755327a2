"""The two ways to ask a server that speaks OpenAI's protocol: by messages, and by token ids."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from openai import AsyncOpenAI, AsyncStream
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from popi.backends.base import ChatRequest, ChatResult, FinishReason, ScoreRequest, ScoreResult
from popi.backends.remote.failures import Malformed
from popi.backends.together import held
from popi.errors import BackendError
from popi.io import writable

if TYPE_CHECKING:
    from popi.backends.causal.chat_tokens import ChatTokens, Rendered

FINISHED: dict[str | None, FinishReason] = {"length": "length", "content_filter": "filtered"}
"""The other reasons all mean that the model has ended its answer."""


class Endpoint(ABC):
    """A way to ask. What goes wrong comes as exceptions, which :func:`popi.backends.remote.failures.failed` reads.

    Attributes:
        scores: Whether log-probabilities of a given response can be had.
    """

    scores = False

    @abstractmethod
    async def chat(self, client: AsyncOpenAI, request: ChatRequest) -> ChatResult:
        """Continues a conversation."""

    @abstractmethod
    def stream(self, client: AsyncOpenAI, request: ChatRequest) -> AsyncIterator[str]:
        """Continues a conversation, piece by piece."""

    @abstractmethod
    async def score(self, client: AsyncOpenAI, request: ScoreRequest) -> ScoreResult:
        """Scores a response."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """The length of a bare text."""


class ByMessages(Endpoint):
    """Chat completions: the server renders the conversation. Nothing more is needed of a black box.

    Args:
        model: The server's name of the model.
        limit: What the server calls the most new tokens.
    """

    def __init__(self, model: str, *, limit: str) -> None:
        self._model, self._limit = model, limit

    async def chat(self, client: AsyncOpenAI, request: ChatRequest) -> ChatResult:
        """Continues a conversation."""
        answer = _whole(await client.chat.completions.create(**self._arguments(request)), ChatCompletion)
        choice = answer.choices[0]
        text, refusal = choice.message.content or "", getattr(choice.message, "refusal", None)
        reason = "refused" if refusal else FINISHED.get(choice.finish_reason, "stop")
        why = {"refused": f"the model refuses: {refusal}", "filtered": WITHHELD}.get(reason)
        read, written = (answer.usage.prompt_tokens, answer.usage.completion_tokens) if answer.usage else (0, 0)
        return ChatResult(text, reason, read, written, self._model, why)

    async def stream(self, client: AsyncOpenAI, request: ChatRequest) -> AsyncIterator[str]:
        """Continues a conversation, piece by piece."""
        chunks = await client.chat.completions.create(
            **self._arguments(request), stream=True, stream_options={"include_usage": True}
        )
        async with held(_pieces(self._model, chunks)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, client: AsyncOpenAI, request: ScoreRequest) -> ScoreResult:
        """Cannot be had: it takes the token ids of the response."""
        raise BackendError(
            f"{self._model}: a server that renders the conversation itself gives no log-probabilities; "
            "name the model's tokenizer if the server has the completions endpoint"
        )

    def count_tokens(self, text: str) -> int:
        """About the length of a text: a token for four ASCII characters, and for each other one."""
        narrow = sum(char.isascii() for char in text)
        return math.ceil(narrow / 4) + len(text) - narrow

    def _arguments(self, request: ChatRequest) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": turn.role, "content": writable(turn.content)} for turn in request.messages],
            self._limit: request.max_tokens,
            **_sampling(request),
        }


WITHHELD = "the server withheld the answer, or the rest of it, by its content filter"


def _sampling(request: ChatRequest) -> dict[str, Any]:
    arguments: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p}
    if request.seed is not None:
        arguments["seed"] = request.seed
    if request.stop:
        arguments["stop"] = list(request.stop)
    return arguments


def _whole(answer: Any, kind: type) -> Any:
    """The SDK gives what it cannot parse as it is, and fields that are missing as ``None``."""
    if not isinstance(answer, kind) or not getattr(answer, "choices", None):
        raise Malformed(str(answer))
    return answer


class ByTokenIds(Endpoint):
    """Completions of token ids: the conversation is rendered here, as it is in training.

    For a server of an open model that has this endpoint; log-probabilities come from prompts that it echoes.

    Args:
        model: The server's name of the model.
        tokens: The model's tokenizer.
        context: The most tokens that the server holds for a request, if that is known.
    """

    scores = True

    def __init__(self, model: str, tokens: ChatTokens, *, context: int | None) -> None:
        self._model, self._tokens, self._context = model, tokens, context

    async def chat(self, client: AsyncOpenAI, request: ChatRequest) -> ChatResult:
        """Continues a conversation."""
        prompt = self._prompt(request, min(request.max_tokens, 1))
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ChatResult.failed(prompt.error, "request", model=self._model, prompt_tokens=length)
        answer = _whole(await client.completions.create(**self._arguments(request, prompt.tokens)), Completion)
        choice, usage = answer.choices[0], answer.usage
        reason = FINISHED.get(choice.finish_reason, "stop")
        written = usage.completion_tokens if usage else self.count_tokens(choice.text)
        return ChatResult(choice.text, reason, length, written, self._model, WITHHELD if reason == "filtered" else None)

    async def stream(self, client: AsyncOpenAI, request: ChatRequest) -> AsyncIterator[str]:
        """Continues a conversation, piece by piece."""
        prompt = self._prompt(request, min(request.max_tokens, 1))
        if prompt.error is not None:
            raise BackendError(f"{self._model}: {prompt.error}", failure="request")
        chunks = await client.completions.create(
            **self._arguments(request, prompt.tokens), stream=True, stream_options=COUNTED
        )
        async with held(_pieces(self._model, chunks)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, client: AsyncOpenAI, request: ScoreRequest) -> ScoreResult:
        """Scores a response: the prompt with it is echoed, and nothing is added."""
        response = [*self._tokens.encode([request.response])[0], *self._tokens.end_of_turn]
        prompt = self._prompt(request, len(response))
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ScoreResult.failed(prompt.error, "request", model=self._model, prompt_tokens=length)
        answer = await client.completions.create(
            model=self._model, prompt=[*prompt.tokens, *response], max_tokens=0, echo=True, logprobs=0, temperature=0
        )
        found = _whole(answer, Completion).choices[0].logprobs
        logprobs = found.token_logprobs if found is not None else None
        if logprobs is None or len(logprobs) < length + len(response):
            raise Malformed("the server does not echo the log-probabilities of the prompt")
        return ScoreResult(sum(logprobs[length : length + len(response)]), len(response), length, self._model)

    def count_tokens(self, text: str) -> int:
        """The length of a bare text, without special tokens."""
        return len(self._tokens.encode([text])[0])

    def _prompt(self, request: ChatRequest | ScoreRequest, needed: int) -> Rendered:
        from popi.backends.causal.admission import admitted

        return admitted(self._tokens, [request.messages], [needed], self._context)[0]

    def _arguments(self, request: ChatRequest, prompt: list[int]) -> dict[str, Any]:
        room = request.max_tokens if self._context is None else self._context - len(prompt)
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": min(request.max_tokens, room),
            **_sampling(request),
            "extra_body": {"stop_token_ids": sorted(self._tokens.end_tokens)},
        }


COUNTED: Any = {"include_usage": True, "continuous_usage_stats": True}
"""Asks a vLLM server to tell with every chunk how many tokens were written until then; others tell it in the end."""


async def _pieces(model: str, chunks: AsyncStream[Any]) -> AsyncIterator[str]:
    """The pieces of a stream, until its end; a stream without one has broken off.

    Chunks have no numbers. Where the server counts tokens as it goes, one that says again what the last one said and
    brings no new token has come twice; elsewhere that goes unnoticed.
    """
    reason, last = None, (0, "")
    async with chunks:
        async for chunk in chunks:
            if not isinstance(chunk, ChatCompletionChunk | Completion):
                raise Malformed(str(chunk))
            if not chunk.choices:
                continue
            reason = chunk.choices[0].finish_reason or reason
            text = chunk.choices[0].text if isinstance(chunk, Completion) else chunk.choices[0].delta.content
            told = (chunk.usage.completion_tokens if chunk.usage else 0, text or "")
            if text and (told != last or not chunk.usage):
                yield text
            last = told
    if reason is None:
        raise Malformed("the stream broke off")
    if reason == "content_filter":
        raise BackendError(f"{model}: {WITHHELD}")
