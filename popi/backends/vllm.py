"""A model that vLLM runs in another process: continuous batching, shared prefixes, adapters, updates of the weights."""

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
    FinishReason,
    OnComplete,
    ScoreRequest,
    ScoreResult,
    ignore_result,
)
from popi.backends.responses import Response, after_prefix
from popi.backends.results import scored
from popi.backends.streaming import Emit, streamed
from popi.backends.together import closing, together
from popi.backends.vllm_engine import (
    Engine,
    FlatLogprobs,
    LoRARequest,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    VLLMClientError,
)
from popi.engine.admission import admitted
from popi.engine.chat_tokens import ChatTokens, Rendered
from popi.engine.decoding import Completion
from popi.engine.gguf import located
from popi.engine.loading import load_tokenizer
from popi.errors import BackendError, ConfigError, ModelError, did_you_mean
from popi.models import fingerprint
from popi.provenance import fingerprint_files

Result = TypeVar("Result")

GIB = 2**30
RANKS = 8, 16, 32, 64, 128, 256, 320, 512
"""The maximum ranks of adapters that vLLM supports."""


class VLLMBackend(Backend):
    """A model that vLLM runs in another process, on a GPU or a CPU.

    Conversations are rendered here as in training, and the engine receives token ids. Common prefixes of requests are
    computed once, so n samples of a conversation are n requests with different seeds. In float32, greedy responses and
    scores (to 1e-3 nats a token) equal those of the transformers backend.

    vLLM's process imports the main script again, so a script must create the backend under ``if __name__ ==
    "__main__":``. Any thread and event loop can use the backend; a forked process cannot.

    Args:
        model: Name of a model, a folder, a GGUF file, or a hub id.
        dtype: ``auto`` (that of :func:`~popi.engine.loading.auto_dtype` on a CPU, else that of the model), ``float32``,
            ``bfloat16`` or ``float16``.
        context_length: Maximum number of tokens of a conversation and its response; ``None`` is the model's maximum.
        cache_gib: Memory for keys and values in GiB; ``None`` leaves it to vLLM.
        adapters: Folders of LoRA adapters, by name.
        adapter: The adapter that this backend uses; ``None`` is the model without one.
        options: Further engine arguments, by vLLM's names: ``{"tensor_parallel_size": 2}``.

    Raises:
        ModelError: If the model or an adapter is missing, broken, or has no chat template, or vLLM cannot run it.
        ConfigError: If a number is not positive, or the adapter is unknown.
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
            raise ConfigError(f"must be positive, got {cache_gib}", field="cache_gib")
        self.model = self._base = model
        self._tokens = ChatTokens(load_tokenizer(model), model)
        self._adapter: LoRARequest | None = None
        self._adapter_files: str | None = None
        self._adapters = {
            name: LoRARequest(name, number, str(Path(folder).resolve()))
            for number, (name, folder) in enumerate((adapters or {}).items(), start=1)
        }
        if adapter is not None:
            self._take(adapter)
        self._settings = {"context_length": context_length, "options": dict(options or {})}
        arguments: dict[str, Any] = {"model": located(model), "dtype": dtype, "enable_prefix_caching": True}
        if context_length is not None:
            arguments["max_model_len"] = context_length
        if cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = int(cache_gib * GIB)
        if adapters:
            arguments |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _rank(adapters)}
        self._engine = Engine(model, {**arguments, **(options or {})})
        self._end_tokens = self._tokens.end_tokens | self._engine.end_tokens
        self.capabilities = Capabilities(
            stream=True, score=True, context_length=self._engine.context_length, response_prefix=True
        )
        # On a CPU vLLM 0.31 applies the adapter of another request in the batch to a request without one, and fails
        # with scores in a batch.
        self._turn = asyncio.Lock() if adapters and self._engine.on_cpu else None
        self._closed, self._owner = False, True

    @property
    def identity(self) -> str:
        """The weights, the adapter, the dtype and the engine options."""
        # Reading all weights takes long.
        self._engine.weights = self._engine.weights or fingerprint(self._base) or self._base
        parts = ["vllm", self._base, self._engine.weights, self._adapter_files, self._engine.dtype, self._settings]
        return json.dumps(parts, sort_keys=True, default=str)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, such as ``torch.float32``."""
        return self._engine.dtype

    def adapted(self, name: str) -> Self:
        """Returns a backend of the same engine that uses an adapter. Closing it leaves the engine open.

        Raises:
            ConfigError: If the adapter is unknown.
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
        self._adapter_files = fingerprint_files(Path(self._adapter.lora_path))

    async def update_weights(self, folder: Path) -> None:
        """Loads other weights of the same model, as training saves them, after the running calls.

        Args:
            folder: A folder with the weights as safetensors.

        Raises:
            ModelError: If there are no weights, or the engine cannot load them. In the second case all calls fail until
                other weights are loaded.
            BackendError: If the backend is closed.
        """
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{folder} contains no safetensors", fix="save the model there")
        await self._run(self._engine.reload(str(folder)))

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the engine is dead.
        """
        return await self._run(self._chats(requests))

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, and yields the text in pieces of whole characters.

        Raises:
            BackendError: If the request fails, or the engine is dead.
        """

        async def chat(emit: Emit) -> ChatResult:
            [result] = await self._run(self._chats([request], emit))
            return result

        async with closing(streamed(self.model, chat, on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Scores each response, including its end of turn, given its conversation.

        Raises:
            BackendError: If the engine is dead.
        """
        return await self._run(self._scores(requests))

    async def sample(
        self, prompts: Sequence[list[int]], *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Completion]:
        """Samples one completion of each prompt, with the log-probability of each token.

        The log-probabilities are those of the distribution that is sampled from if the engine has the option
        ``logprobs_mode: processed_logprobs``, else those at temperature 1.

        Args:
            prompts: Token ids, with room for ``max_tokens`` in the model's context.
            seeds: The seed of each completion. On a CPU, the engine of popi samples the same with the same seeds.
            max_tokens: Maximum number of new tokens.
            temperature: Sampling temperature; must be positive.
            top_p: Nucleus sampling threshold.

        Returns:
            The completions, in order.

        Raises:
            BackendError: If the engine rejects a prompt, or is dead.
        """
        logprobs = {"logprobs": 0, "flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}
        sampling = [self._sampling(max_tokens, temperature, top_p, seed, **logprobs) for seed in seeds]
        return await self._run(self._samples(prompts, sampling))

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a plain text with the model's tokenizer, without special tokens."""
        return len(self._tokens.encode([text])[0])

    async def close(self) -> None:
        """Stops the engine and its process. Waiting calls fail."""
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
        prefixes = self._tokens.encode([request.response_prefix for request in requests])
        needed = [
            len(prefix) + 1 if request.max_tokens > 0 else 0 for request, prefix in zip(requests, prefixes, strict=True)
        ]
        prompts = self._admitted(requests, needed)
        async with self._engine.working(), self._turn or nullcontext():
            return await together(
                self._chat(request, prompt, prefix, emit)
                for request, prompt, prefix in zip(requests, prompts, prefixes, strict=True)
            )

    async def _scores(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        responses = self._tokens.encode_responses([request.response for request in requests])
        prompts = self._admitted(requests, [len(response) for response in responses], answered=True)
        work = zip(prompts, responses, strict=True)
        async with self._engine.working(), self._turn or nullcontext():
            if self._turn:
                return [await self._score(prompt, response) for prompt, response in work]
            return await together(self._score(prompt, response) for prompt, response in work)

    async def _samples(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        async with self._engine.working(), self._turn or nullcontext():
            return await together(self._sample(*each) for each in zip(prompts, sampling, strict=True))

    async def _sample(self, prompt: list[int], sampling: SamplingParams) -> Completion:
        try:
            output = (await self._final(prompt, sampling)).outputs[0]
        except VLLMClientError as error:
            raise BackendError(f"a prompt of {len(prompt)} tokens was rejected: {error}", failure="request") from error
        tokens, logprobs = list(output.token_ids), output.logprobs
        assert isinstance(logprobs, FlatLogprobs)
        return Completion(tokens, logprobs.logprobs, "stop" if tokens[-1] in self._end_tokens else "length")

    async def _chat(self, request: ChatRequest, rendered: Rendered, prefix: list[int], emit: Emit | None) -> ChatResult:
        prompt, tokens, stopped = [*rendered.tokens, *prefix], list[int](), False
        if rendered.error is not None:
            return ChatResult.failed(rendered.error, "request", model=self.model, prompt_tokens=len(prompt))
        response = Response(
            request,
            after_prefix(self._tokens.decode, prefix),
            self._end_tokens,
            opened=self._tokens.opens_reasoning,
            emit=emit,
        )
        try:
            context = self.capabilities.context_length
            room = request.max_tokens if context is None else context - len(prompt)
            sampling = self._sampling(
                min(request.max_tokens, room),
                request.temperature,
                request.top_p,
                request.seed,
                output_kind=RequestOutputKind.DELTA if response.watch else RequestOutputKind.FINAL_ONLY,
            )
            async with aclosing(self._engine.generate(prompt, sampling, self._adapter)) as outputs:
                async for output in outputs:
                    if stopped := _stopped(response, tokens, output.outputs[0].token_ids):
                        break
        except VLLMClientError as error:
            return ChatResult.failed(str(error), "request", model=self.model, prompt_tokens=len(prompt))
        ended = stopped or (bool(tokens) and tokens[-1] in self._end_tokens)
        reason: FinishReason = "stop" if ended else "length"
        return response.result(tokens, reason, prompt_tokens=len(prompt), model=self.model)

    async def _score(self, prompt: Rendered, response: list[int]) -> ScoreResult:
        length = len(prompt.tokens)
        if prompt.error is not None:
            return ScoreResult.failed(prompt.error, "request", model=self.model, prompt_tokens=length)
        # The engine always generates a token, for which the context may have no room: the last token of the response is
        # left out of the prompt, and scored as the next one.
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
            output = await self._final(read, sampling)
        except VLLMClientError as error:
            return ScoreResult.failed(str(error), "request", model=self.model, prompt_tokens=length)
        of_prompt, next_ones = output.prompt_logprobs, output.outputs[0].logprobs
        assert isinstance(of_prompt, FlatLogprobs) and next_ones is not None
        last = next_ones[0][response[-1]].logprob
        logprob = sum(of_prompt.logprobs[length - 1 :]) + last
        return scored(logprob, len(response), model=self.model, prompt_tokens=length)

    async def _final(self, prompt: list[int], sampling: SamplingParams) -> RequestOutput:
        """The last output of a request whose outputs are not streamed."""
        async with aclosing(self._engine.generate(prompt, sampling, self._adapter)) as outputs:
            [output] = [output async for output in outputs]
        return output

    def _sampling(
        self, max_tokens: int, temperature: float, top_p: float, seed: int | None, **options: Any
    ) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=secrets.randbits(63) if seed is None else seed % 2**63,
            stop_token_ids=sorted(self._end_tokens),
            detokenize=False,
            # Each request has its own.
            skip_clone=True,
            **options,
        )

    def _admitted(
        self, requests: Sequence[ChatRequest | ScoreRequest], needed: Sequence[int], *, answered: bool = False
    ) -> list[Rendered]:
        conversations = [request.messages for request in requests]
        return admitted(self._tokens, conversations, needed, self.capabilities.context_length, answered=answered)


def _stopped(response: Response, tokens: list[int], more: Sequence[int]) -> bool:
    """Adds tokens to a response, and returns whether a stop string ends it."""
    if response.watch is None:
        tokens.extend(more)
        return False
    for token in more:
        tokens.append(token)
        if response.watch(tokens):
            return True
    return False


def _rank(adapters: Mapping[str, str]) -> int:
    """The smallest maximum rank that fits all adapters."""
    largest = 0
    for name, folder in adapters.items():
        try:
            config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
            largest = max(largest, int(config["r"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ModelError(
                f"the adapter {name!r} cannot be read: {error}", fix=f"check the folder {folder}"
            ) from error
    fitting = [rank for rank in RANKS if rank >= largest]
    if not fitting:
        raise ModelError(f"vLLM supports adapters up to rank {RANKS[-1]}, but one has rank {largest}")
    return fitting[0]
