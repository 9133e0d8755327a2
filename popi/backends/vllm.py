"""A model that vLLM runs beside this process: continuous batching, shared prefixes, adapters, weights that change."""

from __future__ import annotations

import asyncio
import copy
import json
import secrets
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar

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
from popi.backends.together import held, together
from popi.backends.vllm_engine import (
    Engine,
    FlatLogprobs,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    VLLMClientError,
)
from popi.engine.admission import admitted
from popi.engine.answer import Answer
from popi.engine.chat_tokens import ChatTokens, Rendered
from popi.engine.loading import load_tokenizer
from popi.errors import BackendError, ConfigError, ModelError, did_you_mean
from popi.models import find

Result = TypeVar("Result")

GIB = 2**30
RANKS = 8, 16, 32, 64, 128, 256, 320, 512
"""The ranks of adapters for which vLLM makes room."""


class VLLMBackend(Backend):
    """A model that vLLM runs in a process beside this one, on a GPU or a CPU.

    Conversations are rendered here as they are in training, and the engine is given token ids. What requests have in
    common in front is computed once, so n samples of a conversation are n requests for it, with a seed each. In float32
    greedy text and scores (to 1e-3 nats a token) are those of the transformers backend.

    vLLM's process imports the main script again, so a script makes this behind ``if __name__ == "__main__":``.

    Args:
        model: The name of a shipped model, a folder, or a hub id.
        dtype: ``auto`` (float32 on a CPU, else as the model says), ``float32``, ``bfloat16`` or ``float16``.
        context_length: The most tokens of a conversation and its answer; ``None`` is what the model can hold.
        cache_gib: Memory for keys and values; ``None`` leaves it to vLLM.
        adapters: Folders of LoRA adapters, by the names under which :meth:`adapted` gives them.
        adapter: The one of them under which this backend answers; ``None`` is the bare model.
        options: Further engine arguments, by vLLM's names: ``{"tensor_parallel_size": 2}``.

    Raises:
        ModelError: If the model or an adapter is missing, broken, or without a chat template, or vLLM cannot run it.
        ConfigError: If a number makes no sense, or there is no such adapter.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        context_length: int | None = None,
        cache_gib: float | None = None,
        adapters: Mapping[str, str] | None = None,
        adapter: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if cache_gib is not None and cache_gib <= 0:
            raise ConfigError(f"{cache_gib} GiB hold no keys and values", field="cache_gib")
        self.model = self._base = model
        self._tokens = ChatTokens(load_tokenizer(model), model)
        self._adapter: LoRARequest | None = None
        self._adapters = {
            name: LoRARequest(name, number, str(Path(folder).resolve()))
            for number, (name, folder) in enumerate((adapters or {}).items(), start=1)
        }
        if adapter is not None:
            self._take(adapter)
        arguments: dict[str, Any] = {"model": find(model), "dtype": dtype, "enable_prefix_caching": True}
        if context_length is not None:
            arguments["max_model_len"] = context_length
        if cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = int(cache_gib * GIB)
        if adapters:
            arguments |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _rank(adapters)}
        self._engine = Engine(model, {**arguments, **(options or {})})
        self._end_tokens = self._tokens.end_tokens | self._engine.end_tokens
        self.capabilities = Capabilities(stream=True, score=True, context_length=self._engine.context_length)
        # On a CPU vLLM 0.31 gives a request without an adapter that of a neighbour in its batch, and breaks down over
        # scores in a batch.
        self._turn = asyncio.Lock() if adapters and self._engine.on_cpu else None
        self._closed, self._owner = False, True

    def adapted(self, name: str) -> Self:
        """The same model under one of its adapters, as a backend of the same engine, which it does not close.

        Raises:
            ConfigError: If there is no such adapter.
        """
        other = copy.copy(self)
        other._owner = False
        other._take(name)
        return other

    def _take(self, name: str) -> None:
        if name not in self._adapters:
            raise ConfigError(
                f"{self._base} has no adapter {name!r}", field="adapter", fix=did_you_mean(name, self._adapters)
            )
        self.model, self._adapter = f"{self._base}:{name}", self._adapters[name]

    async def update_weights(self, folder: Path) -> None:
        """Goes on with other weights of the same model, as training saves them; what is under way is finished first.

        Args:
            folder: Holds them as safetensors.

        Raises:
            ModelError: If there are none, or the engine cannot take them; it serves nobody then, until it has taken
                others.
            BackendError: If the backend is closed.
        """
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{folder} holds no weights as safetensors", fix="save the model there")
        await self._run(self._engine.reload(str(folder)))

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the engine is dead.
        """
        return await self._run(self._chats(requests))

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, piece by piece, never half a character.

        Raises:
            BackendError: If the answer cannot be had, or the engine is dead.
        """

        async def chat(emit: Emit) -> ChatResult:
            [result] = await self._run(self._chats([request], emit))
            return result

        async with held(streamed(self.model, chat, on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, end of turn included, given its conversation.

        Raises:
            BackendError: If the engine is dead.
        """
        return await self._run(self._scores(requests))

    def count_tokens(self, text: str) -> int:
        """The length of a bare text by the model's tokenizer, without special tokens."""
        return len(self._tokens.encode([text])[0])

    async def close(self) -> None:
        """Ends the engine and its process; what is still waiting is dropped."""
        self._closed = True
        if self._owner:
            await asyncio.get_running_loop().run_in_executor(None, self._engine.shut_down)

    async def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._closed or self._engine.closed:
            work.close()
            raise BackendError(f"{self.model}: the backend is closed")
        try:
            return await self._engine.run(work)
        except BackendError as error:
            why = "the backend is closed" if self._closed or self._engine.closing else error
            raise BackendError(f"{self.model}: {why}", failure=error.failure) from error
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._engine.closing and caller is not None and not caller.cancelling():
                raise BackendError(f"{self.model}: the backend is closed") from None
            raise

    async def _chats(self, requests: Sequence[ChatRequest], emit: Emit | None = None) -> list[ChatResult]:
        prompts = self._admitted(requests, [min(request.max_tokens, 1) for request in requests])
        async with self._engine.working(), self._turn or nullcontext():
            return await together(
                self._chat(request, prompt, emit) for request, prompt in zip(requests, prompts, strict=True)
            )

    async def _scores(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        texts = self._tokens.encode([request.response for request in requests])
        responses = [[*tokens, *self._tokens.end_of_turn] for tokens in texts]
        prompts = self._admitted(requests, [len(response) for response in responses])
        work = zip(prompts, responses, strict=True)
        async with self._engine.working(), self._turn or nullcontext():
            if self._turn:
                return [await self._score(prompt, response) for prompt, response in work]
            return await together(self._score(prompt, response) for prompt, response in work)

    async def _chat(self, request: ChatRequest, prompt: Rendered, emit: Emit | None) -> ChatResult:
        length, tokens = len(prompt.tokens), list[int]()
        answer = Answer(self._tokens.decode, self._end_tokens, request.stop, emit)
        if prompt.error is not None:
            return ChatResult.failed(prompt.error, "request", model=self.model, prompt_tokens=length)
        try:
            sampling = self._sampling(request, length, whole=not answer.watches)
            async with aclosing(self._engine.generate(prompt.tokens, sampling, self._adapter)) as outputs:
                async for output in outputs:
                    if _ended(answer, tokens, output.outputs[0].token_ids):
                        break
        except VLLMClientError as error:
            return ChatResult.failed(str(error), "request", model=self.model, prompt_tokens=length)
        text, ended = answer.finish(tokens)
        return ChatResult(text, "stop" if ended else "length", length, len(tokens), self.model)

    async def _score(self, prompt: Rendered, response: list[int]) -> ScoreResult:
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ScoreResult.failed(prompt.error, "request", model=self.model, prompt_tokens=length)
        # The engine writes a token in any case, for which the context may have no room: the last one is left out of
        # what it reads, and is asked for as the one that comes next.
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=0,
            flat_logprobs=True,
            logprob_token_ids=response[-1:],
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        read = [*prompt.tokens, *response[:-1]]
        try:
            async with aclosing(self._engine.generate(read, sampling, self._adapter)) as outputs:
                [output] = [output async for output in outputs]
        except VLLMClientError as error:
            return ScoreResult.failed(str(error), "request", model=self.model, prompt_tokens=length)
        of_prompt, next_ones = output.prompt_logprobs, output.outputs[0].logprobs
        assert isinstance(of_prompt, FlatLogprobs) and next_ones is not None
        last = next_ones[0][response[-1]].logprob
        return ScoreResult(sum(of_prompt.logprobs[length - 1 :]) + last, len(response), length, self.model)

    def _sampling(self, request: ChatRequest, prompt: int, *, whole: bool) -> SamplingParams:
        context = self.capabilities.context_length
        room = request.max_tokens if context is None else context - prompt
        return SamplingParams(
            max_tokens=min(request.max_tokens, room),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**63,
            stop_token_ids=sorted(self._end_tokens),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA,
        )

    def _admitted(self, requests: Sequence[ChatRequest | ScoreRequest], needed: Sequence[int]) -> list[Rendered]:
        conversations = [request.messages for request in requests]
        return admitted(self._tokens, conversations, needed, self.capabilities.context_length)


def _ended(answer: Answer, tokens: list[int], more: Sequence[int]) -> bool:
    """Adds tokens to an answer, and says whether a stop text ends it."""
    if not answer.watches:
        tokens.extend(more)
        return False
    for token in more:
        tokens.append(token)
        if answer.watch(tokens):
            return True
    return False


def _rank(adapters: Mapping[str, str]) -> int:
    """Room for the adapters."""
    largest = 0
    for name, folder in adapters.items():
        try:
            config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
            largest = max(largest, int(config["r"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ModelError(f"the adapter {name!r} cannot be read: {error}", fix=f"see what {folder} holds") from error
    fitting = [rank for rank in RANKS if rank >= largest]
    if not fitting:
        raise ModelError(f"vLLM takes adapters up to rank {RANKS[-1]}, and one has {largest}")
    return fitting[0]
