"""Rollouts of vLLM, in another process of this machine."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from popi.backends.vllm import VLLMBackend
from popi.engine.decoding import Completion
from popi.errors import BackendError, PopiError
from popi.training.rollouts import Rollouts
from popi.training.snapshots import TOLERANCE, TOLERANCE_OF_HALF, Snapshot, Weights

DEVICES = "CUDA_VISIBLE_DEVICES"


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

    On a CPU, the samples are those of :class:`popi.training.rollouts.EngineRollouts`, except where rounding decides.

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
        weights: Weights = lambda: None,
        cache_gib: float | None = None,
    ) -> None:
        self._snapshot = Snapshot(model, tokenizer, weights)
        try:
            self._snapshot.write()
            # TRL compares the log-probabilities with those of the policy at the sampling temperature.
            options = {"logprobs_mode": "processed_logprobs"}
            with _own_device():
                self._backend = VLLMBackend(
                    str(self._snapshot.path),
                    dtype="bfloat16" if half else "float32",
                    cache_gib=cache_gib,
                    options=options,
                )
        except BaseException:
            self._snapshot.close()
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
        self._snapshot.write()
        await self._backend.update_weights(self._snapshot.path)
        return await self._backend.sample(prompts, **options)

    def close(self) -> None:
        """Ends vLLM's process, and removes the weights from shared memory."""
        asyncio.run(self._backend.close())
        self._snapshot.close()
