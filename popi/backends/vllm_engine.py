"""vLLM's engine, in its own event loop."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import asynccontextmanager, contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from popi.backends import vllm_worker
from popi.engine.loading import auto_dtype
from popi.errors import BackendError, ModelError
from popi.provenance import fingerprint_files


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables that are not set, during the block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

with environment(QUIET):
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMClientError
    from vllm.inputs.engine import tokens_input
    from vllm.logprobs import FlatLogprobs
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

# It prints that the engine is dead, with a traceback and among the results. The calls of this engine say so, too.
# vLLM would reset its level.
logging.getLogger("vllm.v1.engine.async_llm").disabled = True

__all__ = [
    "Engine",
    "FlatLogprobs",
    "LoRARequest",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "VLLMClientError",
]

Result = TypeVar("Result")

ON_A_CPU = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
"""One additional process instead of two, and no compilation, which takes longer on a CPU than it saves."""

OPTIONS_ON_A_CPU = {
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    # vLLM 0.31 rewinds a request that is partly prefilled, which the random generator of a CPU does not support: a
    # seeded request with a prompt of several hundred tokens would stop the engine.
    "enable_chunked_prefill": False,
}
"""Default engine options on a CPU."""

DEFAULTS = {
    "skip_tokenizer_init": True,
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
    "worker_extension_cls": vllm_worker.NAME,
}

SECONDS_TO_END, SECONDS_BETWEEN_CHECKS = 2.0, 1.0

GUARD = "import os, signal, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), signal.SIGKILL)"
"""vLLM's engine does not notice that its parent process has ended."""


class Engine:
    """An engine that any thread and any event loop of this process can use, until it is shut down.

    The model runs in another process, which ends with this process, even if this one is killed. A forked child cannot
    use it.

    Args:
        name: Name of the model, for errors.
        arguments: Arguments of vLLM's ``AsyncEngineArgs``.

    Attributes:
        closing: Whether the engine is being shut down.
        weights: Fingerprint of the weights; empty until it has been computed.

    Raises:
        ModelError: If vLLM cannot run the model.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        self._process, self._loop = os.getpid(), asyncio.new_event_loop()
        self._calls, self._idle, self._open = 0, asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._open.set()
        self._reloading, self._half_loaded = asyncio.Lock(), ""
        self.closing, self.weights = False, ""
        self._thread = threading.Thread(target=self._loop.run_forever, name="popi-vllm", daemon=True)
        self._thread.start()
        before = set(active_children())
        guards: dict[BaseProcess, subprocess.Popen[bytes]] = {}
        starting = asyncio.run_coroutine_threadsafe(_started(arguments), self._loop)
        try:
            # Loading takes long, and this process may be killed in the meantime.
            while not wait([starting], timeout=0.05).done:
                for process in set(active_children()) - before - guards.keys():
                    guards[process] = _guarded(process.pid)
            self._llm = starting.result()
        # A broken model, an unknown option, too little memory: vLLM and its processes raise exceptions of any type.
        except Exception as error:
            self._end_loop()
            _dismissed(guards.values())
            raise ModelError(
                f"vLLM cannot run {name!r}: {error}", fix="correct its options, or see the output above"
            ) from error
        for process in set(active_children()) - before - guards.keys():
            guards[process] = _guarded(process.pid)
        self._guards = guards
        atexit.register(self.shut_down)

    @property
    def closed(self) -> bool:
        """Whether the engine was shut down."""
        return self._loop.is_closed()

    @property
    def on_cpu(self) -> bool:
        """Whether the model runs on a CPU."""
        return bool(current_platform.is_cpu())

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt and its response."""
        return int(self._llm.model_config.max_model_len)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a response, by the model's generation config."""
        ends = self._llm.model_config.try_get_generation_config().get("eos_token_id")
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    @property
    def dtype(self) -> str:
        """The dtype of the weights, such as ``torch.float32``."""
        return str(self._llm.model_config.dtype)

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine in the engine's loop, and waits for it; cancelling the wait cancels the coroutine.

        Raises:
            BackendError: In a forked child.
        """
        if os.getpid() != self._process:
            work.close()
            raise BackendError("vLLM's engine cannot be used in a forked process; open the model after the fork")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def generate(
        self, prompt: list[int], sampling: SamplingParams, adapter: LoRARequest | None = None
    ) -> AsyncGenerator[RequestOutput]:
        """Continues token ids. Must run in the engine's loop. Closing the generator aborts the request.

        Raises:
            BackendError: If the engine is dead.
        """
        outputs = self._llm.generate(tokens_input(prompt), sampling, uuid.uuid4().hex, lora_request=adapter)
        try:
            async for output in outputs:
                if output.outputs[0].finish_reason == "abort":
                    raise BackendError("the engine aborted the request", failure="server")
                yield output
        except (EngineDeadError, EngineGenerateError) as error:
            raise BackendError(f"the engine is dead: {error.__cause__ or error}", failure="unreachable") from error
        finally:
            await outputs.aclose()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Keeps the weights unchanged during the block. Must run in the engine's loop.

        Raises:
            BackendError: If an update of the weights failed, so that no weights are loaded.
        """
        while not self._open.is_set():
            await self._open.wait()
        if self._half_loaded:
            raise BackendError(self._half_loaded, failure="unreachable")
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def reload(self, folder: str) -> None:
        """Loads other weights of the same model, after the running calls and before all later ones.

        Raises:
            ModelError: If they cannot be loaded. All calls fail until other weights are loaded.
            BackendError: If the engine is dead.
        """
        async with self._reloading:
            self._open.clear()
            try:
                await self._idle.wait()
                await self._while_alive(self._llm.pause_generation(mode="wait"))
                self._half_loaded = f"the weights in {folder} were not loaded, and the previous ones are lost"
                try:
                    await self._while_alive(self._llm.collective_rpc("take_weights", args=(folder,)))
                    self._half_loaded, self.weights = "", fingerprint_files(Path(folder)) or ""
                finally:
                    await self._while_alive(self._llm.resume_generation())
            except EngineDeadError as error:
                raise BackendError(f"the engine is dead: {error.__cause__ or error}", failure="unreachable") from error
            # Errors in the engine's process arrive as plain exceptions.
            except Exception as error:
                raise ModelError(f"the engine cannot load the weights in {folder}: {error}") from error
            finally:
                self._open.set()

    async def _while_alive(self, request: Coroutine[Any, Any, object]) -> None:
        """Waits for a request. vLLM would wait forever if its process ended in the meantime.

        Raises:
            EngineDeadError: If it has ended.
        """
        task = asyncio.ensure_future(request)
        try:
            while not (await asyncio.wait({task}, timeout=SECONDS_BETWEEN_CHECKS))[0]:
                if self._llm.errored:
                    raise EngineDeadError
            await task
        finally:
            task.cancel()

    def shut_down(self) -> None:
        """Ends the engine and its process. May be called more than once."""
        if os.getpid() != self._process:
            return
        atexit.unregister(self.shut_down)
        self.closing = True
        if not self.closed:
            # Before the engine ends: the task that reads its outputs would report the end as a failure.
            asyncio.run_coroutine_threadsafe(_all_cancelled(), self._loop).result()
            self._llm.shutdown(timeout=SECONDS_TO_END)
            self._end_loop()
            for process in self._guards:
                process.join()
            _dismissed(self._guards.values())
            # Its finalizer fails when the interpreter is shutting down.
            del self._llm

    def _end_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(_all_cancelled(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _started(arguments: Mapping[str, Any]) -> AsyncLLM:
    on_cpu = current_platform.is_cpu()
    chosen = {**DEFAULTS, **arguments}
    if on_cpu:
        chosen = {**OPTIONS_ON_A_CPU, **chosen}
        if chosen.get("dtype") == "auto":
            chosen["dtype"] = auto_dtype(chosen["model"], torch.device("cpu"), local_files_only=False)
    with environment({**QUIET, **(ON_A_CPU if on_cpu else {})}):
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**chosen))


def _guarded(process: int | None) -> subprocess.Popen[bytes]:
    """Starts a process that kills the engine's process when this process ends, even by SIGKILL."""
    command = [sys.executable, "-I", "-S", "-c", GUARD, str(process)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _dismissed(guards: Iterable[subprocess.Popen[bytes]]) -> None:
    for guard in guards:
        guard.kill()
        guard.wait()


async def _all_cancelled() -> None:
    """Cancels all tasks of this loop: waiting calls, and the engine's reading of outputs."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
