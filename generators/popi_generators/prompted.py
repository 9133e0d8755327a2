"""Any backend as a generator: the summary stands in the prompt."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence

from popi.backends.base import Backend, ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult, ignore_result
from popi.backends.together import held
from popi.prompts import Message, answer_messages
from popi.roles import Candidate, Conditioned, ConditionedGenerator, context_tokens
from popi.summary import PreferenceSummary, cap_tokens

log = logging.getLogger(__name__)


class PromptedGenerator(ConditionedGenerator):
    """Shows a model the summary as quoted data in front of the prompt.

    Args:
        backend: The model.
        max_tokens: The most tokens of an answer.
        temperature: 0 is greedy.
        seed: Seeds the sampling of each answer; ``None`` draws a seed.
        summary_tokens: The most tokens of a summary that are shown, by this model's tokenizer; ``None`` takes
            what its context has room for.

    Raises:
        ConfigError: If ``summary_tokens`` do not fit the model.
        ModelError: If the model's context has no room for any summary.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        summary_tokens: int | None = None,
    ) -> None:
        self.name = backend.model
        self._backend = backend
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._seed = seed
        self._limit = context_tokens(backend, answer_messages("", ""), max_tokens, summary_tokens)

    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        """See :meth:`ConditionedGenerator.respond`."""
        shown = self._shown(items)
        return await self._backend.chat([self._request(item, shown) for item in items])

    async def stream(self, item: Conditioned, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """See :meth:`ConditionedGenerator.stream`."""
        async with held(self._backend.stream(self._request(item, self._shown([item])), on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, items: Sequence[Candidate]) -> list[ScoreResult]:
        """See :meth:`ConditionedGenerator.score`."""
        shown = self._shown([item.given for item in items])
        return await self._backend.score(
            [ScoreRequest(_messages(item.given, shown), item.response, _user(item.given)) for item in items]
        )

    def _request(self, item: Conditioned, shown: dict[str, str]) -> ChatRequest:
        return ChatRequest(
            messages=_messages(item, shown),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=self._seed,
            user=_user(item),
        )

    def _shown(self, items: Sequence[Conditioned]) -> dict[str, str]:
        """What is shown of each distinct summary: counting tokens costs, and items share summaries."""
        summaries = {item.summary.text: item.summary for item in items if item.summary is not None}
        return {text: self._cap(summary) for text, summary in summaries.items()}

    def _cap(self, summary: PreferenceSummary) -> str:
        text = cap_tokens(summary.text, self._backend.count_tokens, self._limit)
        if text != summary.text:
            log.warning("the summary of %r is shown up to %d tokens alone", summary.user_id, self._limit)
        return text


def _messages(item: Conditioned, shown: dict[str, str]) -> list[Message]:
    return answer_messages(item.prompt, None if item.summary is None else shown[item.summary.text])


def _user(item: Conditioned) -> str:
    return "" if item.summary is None else item.summary.user_id
