"""Rollouts of vLLM, in another process of this machine."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from popi.backends.vllm import VLLMBackend
from popi.engine.decoding import Completion
from popi.errors import BackendError, PopiError
from popi.run_folder import save_weights
from popi.training.rollouts import Rollouts

SHARED_MEMORY, DEVICES = Path("/dev/shm"), "CUDA_VISIBLE_DEVICES"

# A float32 engine differs from the policy by the order of its sums. bfloat16 has eight bits of precision.
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2


def shared_memory(size: int) -> Path | None:
    """The folder of shared memory, or ``None`` if it has no room for two copies of ``size`` bytes.

    A container often has 64 MiB of it. While weights are replaced, the earlier ones may still be there.
    """
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= 2 * size else None


@contextmanager
def _own_device() -> Iterator[None]:
    """Within this block, a new process sees the GPU of this rank only."""
    rank, before = os.environ.get("LOCAL_RANK"), os.environ.get(DEVICES)
    if rank is None or not torch.cuda.is_available():
        yield
        return
    os.environ[DEVICES] = before.split(",")[int(rank)] if before else rank
    try:
        yield
    finally:
        if before is None:
            del os.environ[DEVICES]
        else:
            os.environ[DEVICES] = before


class VLLMRollouts(Rollouts):
    """Samples with vLLM, which gets the current weights of the policy before each call.

    The weights are written to shared memory, or to the temporary folder if they do not fit there. vLLM reads them from
    there. On a CPU, the samples are those of
    :class:`popi.training.rollouts.EngineRollouts`, except where rounding decides.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        half: Whether the policy computes in bfloat16. So does vLLM then.
        weights: The weights of the policy, if they are not those of the model.
        cache_gib: Memory for keys and values in GiB; ``None`` leaves it to vLLM.

    Raises:
        ModelError: If vLLM cannot run the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        half: bool = False,
        weights: Callable[[], Mapping[str, Tensor] | None] = lambda: None,
        cache_gib: float | None = None,
    ) -> None:
        self._model, self._weights = model, weights
        size = sum(weights.numel() * weights.element_size() for weights in model.state_dict().values())
        self._folder = TemporaryDirectory(prefix="popi-", dir=shared_memory(size))
        try:
            tokenizer.save_pretrained(self._folder.name)
            self._save()
            # TRL compares the log-probabilities with those of the policy at the sampling temperature.
            options = {"logprobs_mode": "processed_logprobs"}
            with _own_device():
                self._backend = VLLMBackend(
                    self._folder.name,
                    dtype="bfloat16" if half else "float32",
                    cache_gib=cache_gib,
                    options=options,
                )
        except BaseException:
            self._folder.cleanup()
            raise
        self.tolerance = TOLERANCE_OF_HALF if half else TOLERANCE

    def sample(
        self, prompts: Sequence[list[int]], *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Completion]:
        """See :meth:`Rollouts.sample`.

        Raises:
            ArithmeticError: If a log-probability is not finite.
            PopiError: If vLLM has ended.
        """
        try:
            completions = asyncio.run(
                self._sample(prompts, seeds=seeds, max_tokens=max_tokens, temperature=temperature, top_p=top_p)
            )
        except BackendError as error:
            if error.failure != "unreachable":
                raise
            message = "vLLM, which samples the summaries, has ended; the same command resumes from the last checkpoint"
            raise PopiError(message) from error
        if not all(map(math.isfinite, chain.from_iterable(completion.logprobs for completion in completions))):
            raise ArithmeticError("the log-probabilities of vLLM are not finite")
        return completions

    async def _sample(self, prompts: Sequence[list[int]], **options: Any) -> list[Completion]:
        self._save()
        await self._backend.update_weights(Path(self._folder.name))
        return await self._backend.sample(prompts, **options)

    def _save(self) -> None:
        # transformers writes on the first rank only, and every rank has a vLLM of its own.
        self._model.should_save_on_this_rank = lambda is_main_process: True  # type: ignore[method-assign]
        try:
            save_weights(self._model, self._folder.name, self._weights())
        finally:
            del self._model.should_save_on_this_rank

    def close(self) -> None:
        """Ends vLLM's process, and removes the weights from shared memory."""
        asyncio.run(self._backend.close())
        self._folder.cleanup()
