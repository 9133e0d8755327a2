"""Rollouts of vLLM, in another process of this machine."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from popi.backends.vllm import VLLMBackend
from popi.engine.decoding import Completion
from popi.errors import BackendError, PopiError
from popi.training.rollouts import Rollouts

SHARED_MEMORY = Path("/dev/shm")

# A float32 engine differs from the policy by the order of its sums. bfloat16 has eight bits of precision.
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2


def shared_memory(size: int) -> Path | None:
    """The folder of shared memory, or ``None`` if it has no room for two copies of ``size`` bytes.

    A container often has 64 MiB of it. While weights are replaced, the earlier ones may still be there.
    """
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= 2 * size else None


class VLLMRollouts(Rollouts):
    """Samples with vLLM, which gets the current weights of the policy before each call.

    The weights are written to shared memory, or to the temporary folder if they do not fit there. vLLM reads them from
    there. On a CPU, the samples are those of
    :class:`popi.training.rollouts.EngineRollouts`, except where rounding decides.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        cache_gib: Memory for keys and values in GiB; ``None`` leaves it to vLLM.

    Raises:
        ModelError: If vLLM cannot run the model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, cache_gib: float | None = None
    ) -> None:
        self._model = model
        size = sum(weights.numel() * weights.element_size() for weights in model.state_dict().values())
        self._folder = TemporaryDirectory(prefix="popi-", dir=shared_memory(size))
        try:
            tokenizer.save_pretrained(self._folder.name)
            model.save_pretrained(self._folder.name)
            # TRL compares the log-probabilities with those of the policy at the sampling temperature.
            options = {"logprobs_mode": "processed_logprobs"}
            self._backend = VLLMBackend(self._folder.name, cache_gib=cache_gib, options=options)
        except BaseException:
            self._folder.cleanup()
            raise
        self.tolerance = TOLERANCE if self._backend.dtype == "torch.float32" else TOLERANCE_OF_HALF

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
        self._model.save_pretrained(self._folder.name)
        await self._backend.update_weights(Path(self._folder.name))
        return await self._backend.sample(prompts, **options)

    def close(self) -> None:
        """Ends vLLM's process, and removes the weights from shared memory."""
        asyncio.run(self._backend.close())
        self._folder.cleanup()
