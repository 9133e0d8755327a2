"""The two ways to ask a server that speaks OpenAI's protocol: by messages, and by token ids."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from openai import AsyncOpenAI, AsyncStream

from popi.backends.base import ChatRequest, ChatResult, FinishReason, OnComplete, ScoreRequest, ScoreResult
from popi.backends.remote.wire import BrokenOff, ChatAnswer, Chunk, Malformed, TextAnswer, read
from popi.backends.together import held
from popi.errors import BackendError
from popi.io import writable

if TYPE_CHECKING:
    from popi.engine.chat_tokens import ChatTokens, Rendered

BROKEN_OFF = {"abort", "error", "cancelled", "insufficient_system_resource"}
"""Reasons for which servers end an answer before the model does."""


def _finish(reason: str | None) -> FinishReason:
    """Why an answer ended; servers have many words for a model that has ended it.

    Raises:
        BrokenOff: If it was not the model, nor the length, nor a filter.
    """
    if reason in BROKEN_OFF:
        raise BrokenOff(f"the server broke the answer off: {reason}")
    return {"length": "length", "content_filter": "filtered"}.get(reason or "", "stop")  # type: ignore[return-value]


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
    def stream(self, client: AsyncOpenAI, request: ChatRequest, on_complete: OnComplete) -> AsyncIterator[str]:
        """Continues a conversation, piece by piece, and tells the whole answer in the end."""

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
        sampling: Whether the model takes a temperature and a nucleus.
    """

    def __init__(self, model: str, *, limit: str, sampling: bool) -> None:
        self._model, self._limit, self._takes_sampling = model, limit, sampling

    async def chat(self, client: AsyncOpenAI, request: ChatRequest) -> ChatResult:
        """Continues a conversation."""
        answer = read(ChatAnswer, await client.chat.completions.create(**self._arguments(request)))
        choice = answer.choices[0]
        text, refusal = choice.message.content or "", choice.message.refusal
        reason = "refused" if refusal else _finish(choice.finish_reason)
        why = {"refused": REFUSED.format(refusal), "filtered": WITHHELD}.get(reason)
        return ChatResult(text, reason, answer.read, answer.written, self._model, why)

    async def stream(self, client: AsyncOpenAI, request: ChatRequest, on_complete: OnComplete) -> AsyncIterator[str]:
        """Continues a conversation, piece by piece, and tells the whole answer in the end."""
        chunks = await client.chat.completions.create(
            **self._arguments(request), stream=True, stream_options={"include_usage": True}
        )
        async with held(_pieces(self._model, chunks, on_complete)) as pieces:
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
            **_sampling(request, sampling=self._takes_sampling),
        }


REFUSED = "the model refuses: {}"
WITHHELD = "the server withheld the answer, or the rest of it, by its content filter"


def _sampling(request: ChatRequest, *, sampling: bool = True) -> dict[str, Any]:
    arguments: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p} if sampling else {}
    if request.seed is not None:
        arguments["seed"] = request.seed
    if request.stop:
        arguments["stop"] = list(request.stop)
    return arguments


class ByTokenIds(Endpoint):
    """Completions of token ids: the conversation is rendered here, as it is in training.

    For a server of an open model that has this endpoint; log-probabilities come from prompts that it echoes.

    Args:
        model: The server's name of the model.
        tokens: The model's tokenizer.
        context: The most tokens that the server holds for a request, if that is known.
        scores: Whether the server echoes log-probabilities.
    """

    def __init__(self, model: str, tokens: ChatTokens, *, context: int | None, scores: bool) -> None:
        self._model, self._tokens, self._context, self.scores = model, tokens, context, scores

    async def chat(self, client: AsyncOpenAI, request: ChatRequest) -> ChatResult:
        """Continues a conversation."""
        prompt = self._prompt(request, min(request.max_tokens, 1))
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ChatResult.failed(prompt.error, "request", model=self._model, prompt_tokens=length)
        answer = read(TextAnswer, await client.completions.create(**self._arguments(request, prompt.tokens)))
        text, reason = answer.choices[0].text or "", _finish(answer.choices[0].finish_reason)
        why = WITHHELD if reason == "filtered" else None
        return self._counted(ChatResult(text, reason, length, answer.written, self._model, why), length)

    async def stream(self, client: AsyncOpenAI, request: ChatRequest, on_complete: OnComplete) -> AsyncIterator[str]:
        """Continues a conversation, piece by piece, and tells the whole answer in the end."""
        prompt = self._prompt(request, min(request.max_tokens, 1))
        if prompt.error is not None:
            raise BackendError(f"{self._model}: {prompt.error}", failure="request")
        chunks = await client.completions.create(
            **self._arguments(request, prompt.tokens), stream=True, stream_options=COUNTED
        )

        def answered(result: ChatResult) -> None:
            on_complete(self._counted(result, len(prompt.tokens)))

        async with held(_pieces(self._model, chunks, answered)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, client: AsyncOpenAI, request: ScoreRequest) -> ScoreResult:
        """Scores a response: the prompt with it is echoed, and nothing is added."""
        if not self.scores:
            raise BackendError(f"{self._model}: this server was said to echo no log-probabilities", failure="denied")
        response = [*self._tokens.encode([request.response])[0], *self._tokens.end_of_turn]
        prompt = self._prompt(request, len(response))
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ScoreResult.failed(prompt.error, "request", model=self._model, prompt_tokens=length)
        answer = await client.completions.create(
            model=self._model, prompt=[*prompt.tokens, *response], max_tokens=0, echo=True, logprobs=0, temperature=0
        )
        found = read(TextAnswer, answer).choices[0].logprobs
        if found is None or not found.token_logprobs:
            raise BackendError(
                f"{self._model}: the server does not echo the log-probabilities of the prompt; say so: scores: false",
                failure="denied",
            )
        logprobs = found.token_logprobs[length : length + len(response)]
        known = [logprob for logprob in logprobs if logprob is not None]
        if len(known) < len(response):
            raise Malformed("log-probabilities of the response are missing")
        return ScoreResult(sum(known), len(response), length, self._model)

    def count_tokens(self, text: str) -> int:
        """The length of a bare text, without special tokens."""
        return len(self._tokens.encode([text])[0])

    def _counted(self, result: ChatResult, prompt: int) -> ChatResult:
        """With the tokens that were sent, and those of the answer also where the server does not say."""
        written = result.completion_tokens or self.count_tokens(result.text)
        return replace(result, prompt_tokens=prompt, completion_tokens=written)

    def _prompt(self, request: ChatRequest | ScoreRequest, needed: int) -> Rendered:
        from popi.engine.admission import admitted

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


async def _pieces(model: str, chunks: AsyncStream[Any], on_complete: OnComplete) -> AsyncIterator[str]:
    """The pieces of a stream, until its end; a stream without one has broken off.

    Chunks have no numbers. Where the server counts tokens as it goes, one that says again what the last one said and
    brings no new token has come twice; elsewhere that goes unnoticed.
    """
    reason, last, refusal, text, spent = None, (0, ""), "", "", (0, 0)
    async with chunks:
        async for sent in chunks:
            chunk = read(Chunk, sent)
            spent = (chunk.read, chunk.written) if chunk.usage else spent
            if not chunk.choices:
                continue
            piece = chunk.choices[0]
            reason, refusal = piece.finish_reason or reason, refusal + piece.refusal
            told = (chunk.written, piece.content)
            if piece.content and (told != last or not chunk.usage):
                text += piece.content
                yield piece.content
            last = told
    if reason is None:
        raise Malformed("the stream broke off")
    if (finish := _finish(reason)) == "filtered" or refusal:
        raise BackendError(f"{model}: {REFUSED.format(refusal) if refusal else WITHHELD}", failure="withheld")
    on_complete(ChatResult(text, finish, *spent, model))
