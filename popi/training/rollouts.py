"""Rollouts: completions that are sampled from the policy in training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedModel

from popi.engine.checks import Abilities
from popi.engine.decoding import Completion, Draft, decode
from popi.training.likelihood import Within, computing


class Rollouts(ABC):
    """Samples from the current weights of the policy: prompts in, completions with their log-probabilities out.

    Attributes:
        tolerance: Maximum mean difference of a token's log-probability between the sampler and the policy, in nats.
            ``None`` if the sampler computes with the weights of the policy itself.
    """

    tolerance: float | None = None

    @abstractmethod
    def close(self) -> None:
        """Frees what the sampler holds."""

    @abstractmethod
    def sample(
        self, prompts: Sequence[list[int]], *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Completion]:
        """Samples one completion of each prompt. The completions of a group have equal, adjacent prompts.

        Args:
            prompts: Token ids.
            seeds: The seed of each completion. A completion does not depend on the others.
            max_tokens: Maximum number of new tokens.
            temperature: Sampling temperature.
            top_p: Nucleus sampling threshold.

        Returns:
            The completions, in order.

        Raises:
            ArithmeticError: If the logits of the policy are not finite.
        """


class EngineRollouts(Rollouts):
    """Samples with the engine, in this process: the prompt of a group is computed once.

    Args:
        model: The policy.
        abilities: The layout of a batch and the end tokens.
        batch_tokens: Maximum number of tokens of a batch. The completions of one prompt are sampled in one batch even
            if they need more.
        within: Makes the context that the model computes in, by default :func:`computing`.
    """

    def __init__(
        self, model: PreTrainedModel, *, abilities: Abilities, batch_tokens: int, within: Within | None = None
    ) -> None:
        self._model, self._abilities, self._batch_tokens = model, abilities, batch_tokens
        self._within = within or partial(computing, model)

    def close(self) -> None:
        """Does nothing: the policy belongs to the caller."""

    def sample(
        self, prompts: Sequence[list[int]], *, seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[Completion]:
        """See :meth:`Rollouts.sample`."""
        drafts = [
            Draft(prompt, limit=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        with self._within():
            return decode(
                self._model,
                drafts,
                end_tokens=self._abilities.end_tokens,
                # In several batches, the prompt of a group would be computed once for each of them.
                batch_tokens=max(self._batch_tokens, largest_group(prompts, max_tokens)),
                layout=self._abilities.layout,
                logprobs=True,
            )


def largest_group(prompts: Sequence[list[int]], max_tokens: int) -> int:
    """Number of tokens of the largest group of equal, adjacent prompts, with room for their completions."""
    largest = size = 0
    for place, prompt in enumerate(prompts):
        size = size + max_tokens if place and prompt == prompts[place - 1] else len(prompt) + max_tokens
        largest = max(largest, size)
    return largest
