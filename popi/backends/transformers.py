"""Any Hugging Face causal language model, in this process."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Self, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from popi.backends.base import (
    Backend,
    Capabilities,
    ChatRequest,
    ChatResult,
    OnComplete,
    ScoreRequest,
    ScoreResult,
    ignore_result,
)
from popi.backends.responses import Response, after_prefix
from popi.backends.results import scored
from popi.backends.streaming import Emit, streamed
from popi.backends.together import closing
from popi.engine.admission import admitted
from popi.engine.chat_tokens import ChatTokens, Rendered
from popi.engine.checks import verify
from popi.engine.decoding import Draft, Outcome
from popi.engine.loading import load
from popi.engine.packed import pack
from popi.engine.packing import Scored
from popi.engine.service import ModelService, Within
from popi.models import fingerprint
from popi.provenance import fingerprint_weights

BATCH_TOKENS = 16384

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Chat:
    """A chat request as the model reads it.

    Attributes:
        prompt: Tokens of the conversation and the response prefix, or the reason why it is refused.
        draft: The prompt to continue; ``None`` if the request is refused.
        response: Decodes the response.
    """

    prompt: Rendered
    draft: Draft | None
    response: Response


class TransformersBackend(Backend):
    """A causal language model of the transformers library, with its own chat template, on a CPU or a GPU.

    All calls, from any thread and event loop, share one continuous batch: a finished response is returned immediately,
    and makes room for the next one. In float32 greedy text and scores (to 1e-4 nats) do not depend on the batch, and a
    request with a seed samples the same text in any batch; in half precision the batch affects rounding. Cancelling a
    call stops its work at the next step. A response is never longer than the context allows.

    Example:
        >>> import asyncio
        >>> from popi.prompts import Message
        >>> backend = TransformersBackend("popi-mini-writer")
        >>> [result] = asyncio.run(backend.chat([ChatRequest([Message("user", "Hello")], max_tokens=8)]))
        >>> result.completion_tokens <= 8
        True

    Args:
        model: Name of a model, a folder, a GGUF file, or a hub id.
        device: ``cpu``, ``cuda`` and so on; ``None`` is the first GPU if there is one, else the CPU.
        dtype: ``auto`` (:func:`~popi.engine.loading.auto_dtype`), ``float32``, ``bfloat16`` or ``float16``.
        batch_tokens: Maximum number of tokens in a batch, including room for the responses. Less takes less memory.

    Attributes:
        abilities: The layout of a batch and the end tokens, as verified on the loaded model.

    Raises:
        ModelError: If the model is missing, broken, or has no chat template.
        ConfigError: If the device is not available, or the dtype is unknown.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        loaded, tokenizer = load(model, device, dtype)
        pack(loaded)
        self._take(loaded, tokenizer, name=model, batch_tokens=batch_tokens, within=nullcontext, live=False)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        batch_tokens: int = BATCH_TOKENS,
        within: Within = nullcontext,
    ) -> Self:
        """Makes a backend from a loaded model, without a copy. Changes of its weights take effect immediately.

        Args:
            model: The model.
            tokenizer: Its tokenizer, with a chat template.
            name: Its name in results and errors.
            batch_tokens: Maximum number of tokens in a batch, including room for the responses.
            within: Makes the context that the model computes in, for example autocast.

        Raises:
            ModelError: If the tokenizer has no chat template.
        """
        backend = cls.__new__(cls)
        backend._take(model, tokenizer, name=name, batch_tokens=batch_tokens, within=within, live=True)
        return backend

    def _take(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        batch_tokens: int,
        within: Within,
        live: bool,
    ) -> None:
        self.model, self._live, self._model, self._tokenizer = name, live, model, tokenizer
        self._identity: str | None = None
        self._tokens = ChatTokens(tokenizer, name)
        self.abilities = verify(model, self._tokens, name)
        self._service = ModelService(
            model,
            name,
            layout=self.abilities.layout,
            end_tokens=self.abilities.end_tokens,
            batch_tokens=batch_tokens,
            within=within,
        )
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.capabilities = Capabilities(stream=True, score=True, context_length=context, response_prefix=True)

    @property
    def identity(self) -> str:
        """Name, weights, tokenizer and dtype of the model.

        The weights of a model that was loaded by name are identified once, by its files or its commit on the hub. Those
        of a model that was passed in are hashed each time, because they may have changed.
        """
        if self._live:
            return self._identified_by(fingerprint_weights(self._model.state_dict()))
        if self._identity is None:
            self._identity = self._identified_by(fingerprint(self.model))
        return self._identity

    def _identified_by(self, weights: str | None) -> str:
        tokenizer = f"{self._tokenizer.chat_template}{sorted(self._tokenizer.get_vocab().items())}"
        digest = hashlib.sha256(tokenizer.encode()).hexdigest()[:16]
        return (
            f"{self.model} weights={weights} tokenizer={digest} dtype={str(self._model.dtype).removeprefix('torch.')}"
        )

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the model fails, for example because it is out of memory, or the backend is closed.
        """
        return await self._chat(requests)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, in pieces of whole characters.

        Raises:
            BackendError: If the request or the model fails, or the backend is closed.
        """

        async def chat(emit: Emit) -> ChatResult:
            [result] = await self._chat([request], emit)
            return result

        async with closing(streamed(self.model, chat, on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, including its end of turn, given its conversation.

        Raises:
            BackendError: As :meth:`chat`.
        """
        prompts, responses = await asyncio.to_thread(self._read_scored, requests)
        both = list(zip(prompts, responses, strict=True))
        items = [Scored(prompt.tokens, response) for prompt, response in both if prompt.error is None]
        logprobs = await asyncio.wrap_future(self._service.score(items))
        sums = iter(logprobs)
        return [
            self._score_result(prompt, response, next(sums) if prompt.error is None else math.nan)
            for prompt, response in both
        ]

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a plain text with the model's tokenizer, without special tokens."""
        return len(self._tokens.encode([text])[0])

    async def close(self) -> None:
        """Fails the waiting calls, and releases the model after its current step."""
        await asyncio.to_thread(self._service.close)

    async def _chat(self, requests: Sequence[ChatRequest], emit: Emit | None = None) -> list[ChatResult]:
        chats = await asyncio.to_thread(self._read, requests, emit)
        drafts = [chat.draft for chat in chats if chat.draft is not None]
        outcomes = await asyncio.wrap_future(self._service.decode(drafts))
        ended = iter(outcomes)
        return [self._chat_result(chat, None if chat.draft is None else next(ended)) for chat in chats]

    def _read(self, requests: Sequence[ChatRequest], emit: Emit | None) -> list[_Chat]:
        prefixes = self._tokens.encode([request.response_prefix for request in requests])
        both = zip(requests, prefixes, strict=True)
        prompts = self._admitted(
            requests, [1 + len(prefix) if request.max_tokens > 0 else 0 for request, prefix in both]
        )
        parts = zip(requests, prompts, prefixes, strict=True)
        return [self._read_one(request, prompt, prefix, emit) for request, prompt, prefix in parts]

    def _read_one(self, request: ChatRequest, prompt: Rendered, prefix: list[int], emit: Emit | None) -> _Chat:
        decode = after_prefix(self._tokens.decode, prefix)
        response = Response(request, decode, self.abilities.end_tokens, opened=self._tokens.opens_reasoning, emit=emit)
        if prompt.error is not None:
            return _Chat(prompt, None, response)
        tokens, context = [*prompt.tokens, *prefix], self.capabilities.context_length
        draft = Draft(
            tokens,
            limit=request.max_tokens if context is None else min(request.max_tokens, context - len(tokens)),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**63,
            watch=response.watch,
        )
        return _Chat(Rendered(tokens), draft, response)

    def _chat_result(self, chat: _Chat, outcome: Outcome | None) -> ChatResult:
        length = len(chat.prompt.tokens)
        if outcome is None:
            return ChatResult.failed(chat.prompt.error or "", "request", model=self.model, prompt_tokens=length)
        if isinstance(outcome, ArithmeticError):
            return ChatResult.failed(str(outcome), "malformed", model=self.model, prompt_tokens=length)
        return chat.response.result(outcome.token_ids, outcome.finish_reason, prompt_tokens=length, model=self.model)

    def _read_scored(self, requests: Sequence[ScoreRequest]) -> tuple[list[Rendered], list[list[int]]]:
        responses = self._tokens.encode_responses([request.response for request in requests])
        return self._admitted(requests, [len(response) for response in responses], answered=True), responses

    def _score_result(self, prompt: Rendered, response: Sequence[int], logprob: float) -> ScoreResult:
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ScoreResult.failed(prompt.error, "request", model=self.model, prompt_tokens=length)
        return scored(logprob, len(response), model=self.model, prompt_tokens=length)

    def _admitted(
        self, requests: Sequence[ChatRequest | ScoreRequest], needed: Sequence[int], *, answered: bool = False
    ) -> list[Rendered]:
        conversations = [request.messages for request in requests]
        return admitted(self._tokens, conversations, needed, self.capabilities.context_length, answered=answered)
