"""Any Hugging Face causal language model, in this process."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Self, TypeVar

import torch
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
from popi.backends.streaming import Emit, streamed
from popi.backends.together import held
from popi.engine.admission import admitted
from popi.engine.answer import Answer
from popi.engine.cache import has_plain_cache
from popi.engine.chat_tokens import ChatTokens, Rendered
from popi.engine.decoding import Draft, decode, end_tokens_of
from popi.engine.loading import load
from popi.engine.packing import Scored
from popi.engine.scoring import score
from popi.errors import BackendError

log = logging.getLogger(__name__)

BATCH_TOKENS = 16384

Result = TypeVar("Result")
Check = Callable[[], None]
Within = Callable[[], AbstractContextManager[None]]


class TransformersBackend(Backend):
    """A causal language model of the transformers library, with its own chat template, on a CPU or a GPU.

    Requests are batched by length. In float32 greedy text and scores (to 1e-4 nats) do not depend on the batch, and a
    request with a seed samples the same in any; in half precision a batch decides how numbers are rounded. Work runs
    in one thread of its own, one call after the other, and stops between two steps when the call is cancelled. An
    answer is no longer than the context leaves room for.

    Args:
        model: The name of a shipped model, a folder, or a hub id.
        device: ``cpu``, ``cuda`` and so on; ``None`` is the first GPU if there is one, else the CPU.
        dtype: ``auto`` (float32 on a CPU, else bfloat16), ``float32``, ``bfloat16`` or ``float16``.
        batch_tokens: The most tokens in a batch, room for the answers included; less takes less memory.

    Raises:
        ModelError: If the model is missing, broken, or without a chat template.
        ConfigError: If there is no such device or dtype.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._take(*load(model, device, dtype), name=model, batch_tokens=batch_tokens, within=nullcontext)

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
        """Makes a backend of a live model, which it shares: what training does to the weights shows at once.

        Args:
            model: The model.
            tokenizer: Its tokenizer, with a chat template.
            name: What it is called.
            batch_tokens: The most tokens in a batch.
            within: Makes what the model computes within, such as an autocast.

        Raises:
            ModelError: If the tokenizer has no chat template.
        """
        backend = cls.__new__(cls)
        backend._take(model, tokenizer, name=name, batch_tokens=batch_tokens, within=within)
        return backend

    def _take(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        batch_tokens: int,
        within: Within,
    ) -> None:
        self.model, self._within = name, within
        self._model, self._tokens, self._batch_tokens = model, ChatTokens(tokenizer, name), batch_tokens
        self._end_tokens = end_tokens_of(model, self._tokens)
        self._share = has_plain_cache(model)
        if not self._share:
            log.warning("%s keeps no plain key/value cache: its requests run one by one and share no prefix", name)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.capabilities = Capabilities(stream=True, score=True, context_length=context)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="popi-model")
        self._closed = False

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the model fails, for want of memory or otherwise.
        """
        return await self._work(lambda check: self._chat(requests, check))

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece, never half a character.

        Raises:
            BackendError: If the answer cannot be had, or the model fails.
        """

        async def chat(emit: Emit) -> ChatResult:
            [result] = await self._work(lambda check: self._chat([request], check, emit))
            return result

        async with held(streamed(self.model, chat, on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, end of turn included, given its conversation.

        Raises:
            BackendError: If the model fails, for want of memory or otherwise.
        """
        return await self._work(lambda check: self._score(requests, check))

    def count_tokens(self, text: str) -> int:
        """The length of a bare text by the model's tokenizer, without special tokens."""
        return len(self._tokens.encode([text])[0])

    async def close(self) -> None:
        """Lets the worker go; what is still waiting is dropped."""
        self._closed = True
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _work(self, job: Callable[[Check], Result]) -> Result:
        """Runs a job in the worker thread; a cancelled call makes it stop at its next check."""
        if self._closed:
            raise BackendError(f"{self.model}: the backend is closed")
        cancelled = threading.Event()

        def check() -> None:
            if cancelled.is_set():
                raise _Cancelled

        def run() -> Result:
            check()
            try:
                with evaluating(self._model), self._within():
                    return job(check)
            except (BackendError, _Cancelled):
                raise
            # A model's own code raises whatever it likes: out of memory, a lost device, an index beyond a table.
            except Exception as error:
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                raise BackendError(f"{self.model}: {type(error).__name__}: {reason}") from error

        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, run)
        except asyncio.CancelledError:
            cancelled.set()
            caller = asyncio.current_task()
            if self._closed and caller is not None and not caller.cancelling():
                raise BackendError(f"{self.model}: the backend is closed") from None
            raise

    def _chat(self, requests: Sequence[ChatRequest], check: Check, emit: Emit | None = None) -> list[ChatResult]:
        prompts = self._prompts(requests, [min(request.max_tokens, 1) for request in requests])
        answers = [Answer(self._tokens.decode, self._end_tokens, request.stop, emit) for request in requests]
        drafts = [
            self._draft(request, prompt.tokens, answer)
            for request, prompt, answer in zip(requests, prompts, answers, strict=True)
            if prompt.error is None
        ]
        written = iter(
            decode(
                self._model,
                drafts,
                end_tokens=self._end_tokens,
                batch_tokens=self._batch_tokens,
                share=self._share,
                check=check,
            )
        )
        return [
            self._chat_result(prompt, answer, next(written) if prompt.error is None else [])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _draft(self, request: ChatRequest, prompt: list[int], answer: Answer) -> Draft:
        context = self.capabilities.context_length
        room = request.max_tokens if context is None else context - len(prompt)
        return Draft(
            prompt,
            limit=min(request.max_tokens, room),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**63,
            watch=answer.watch if answer.watches else None,
        )

    def _chat_result(self, prompt: Rendered, answer: Answer, tokens: Sequence[int]) -> ChatResult:
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ChatResult.failed(prompt.error, "request", model=self.model, prompt_tokens=length)
        text, ended = answer.finish(tokens)
        return ChatResult(text, "stop" if ended else "length", length, len(tokens), self.model)

    def _score(self, requests: Sequence[ScoreRequest], check: Check) -> list[ScoreResult]:
        texts = self._tokens.encode([request.response for request in requests])
        responses = [[*tokens, *self._tokens.end_of_turn] for tokens in texts]
        prompts = self._prompts(requests, [len(response) for response in responses])
        items = [
            Scored(prompt.tokens, response)
            for prompt, response in zip(prompts, responses, strict=True)
            if prompt.error is None
        ]
        sums = iter(score(self._model, items, batch_tokens=self._batch_tokens, share=self._share, check=check))
        return [
            ScoreResult(next(sums), len(response), len(prompt.tokens), self.model)
            if prompt.error is None
            else ScoreResult.failed(prompt.error, "request", model=self.model, prompt_tokens=len(prompt.tokens))
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _prompts(self, requests: Sequence[ChatRequest | ScoreRequest], needed: Sequence[int]) -> list[Rendered]:
        conversations = [request.messages for request in requests]
        return admitted(self._tokens, conversations, needed, self.capabilities.context_length)


class _Cancelled(Exception):
    """The call that the work was for is gone."""


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model neither drops out nor records gradients; a model in training goes back to it."""
    training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
