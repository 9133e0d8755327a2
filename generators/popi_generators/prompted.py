"""A generator that quotes the summary in the prompt, for any backend."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence

from popi.backends.base import Backend, ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult, ignore_result
from popi.backends.together import closing
from popi.errors import ConfigError
from popi.interface import Interface, UserEmbedding
from popi.prompts import DEFAULT, Message, PromptSet
from popi.roles import AnswerFormat, Candidate, Conditioned, ConditionedGenerator, context_budget
from popi.summary import cap_tokens
from popi.trained import prompts_of, warn_of_other_templates

log = logging.getLogger(__name__)


class QuotedSummary(AnswerFormat):
    """Quotes the summary as data before the prompt.

    Example:
        >>> from popi.summary import Author, Claim, Provenance, summarize_claims
        >>> claims = [Claim(text="short answers")]
        >>> summary = summarize_claims("ann", claims, Provenance(author=Author.ORACLE))
        >>> [message] = QuotedSummary(len, limit=100).render("What is tea?", summary)
        >>> message.content.splitlines()[2]
        '- short answers'

    Args:
        count_tokens: Counts the tokens of a text with the generator's tokenizer.
        limit: Maximum number of tokens of a summary. A longer one is cut at the end of a line, with a warning.
        prompts: The templates.
    """

    prompts: PromptSet

    def __init__(self, count_tokens: Callable[[str], int], *, limit: int, prompts: PromptSet = DEFAULT) -> None:
        self._count_tokens, self._limit, self.prompts = count_tokens, limit, prompts
        self._capped = ("", "")

    @property
    def template_hash(self) -> str:
        """The hash of the prompt set."""
        return self.prompts.hash

    @property
    def max_context_tokens(self) -> int:
        """The limit."""
        return self._limit

    def render(self, prompt: str, interface: Interface | None) -> list[Message]:
        """See :meth:`AnswerFormat.render`.

        Raises:
            ConfigError: If the interface is not a summary.
        """
        if interface is None:
            return self.prompts.answer_messages(prompt)
        if isinstance(interface, UserEmbedding):
            raise ConfigError("this generator accepts summaries, not embeddings", fix="infer a summary of the user")
        return self.prompts.answer_messages(prompt, self._cap(interface.text, interface.user_id))

    def _cap(self, text: str, user_id: str) -> str:
        # Counting tokens is slow, and consecutive prompts often share a summary.
        known, capped = self._capped
        if text != known:
            capped = cap_tokens(text, self._count_tokens, self._limit)
            if capped != text:
                log.warning("the summary of user %r was cut to %d tokens", user_id, self._limit)
            self._capped = (text, capped)
        return capped


class PromptedGenerator(ConditionedGenerator):
    """Responds to prompts with a language model that reads the summary before the prompt.

    Example:
        >>> import asyncio
        >>> from popi.testing import ScriptedBackend
        >>> generator = PromptedGenerator(ScriptedBackend({"What is tea?": "A drink."}), max_tokens=64)
        >>> [result] = asyncio.run(generator.respond([Conditioned("What is tea?")]))
        >>> result.text
        'A drink.'

    Args:
        backend: The model.
        max_tokens: Maximum number of tokens of a response.
        temperature: Sampling temperature; 0 is greedy.
        seed: Seed for sampling of each response; ``None`` draws a random seed.
        summary_tokens: Maximum number of tokens of a summary, by this model's tokenizer; ``None`` uses as many as fit
            its context.
        prompts: A prompt set, or its name; ``None`` is the set that the model was trained with, else the default.
        format: Renders conversations, in place of the default format.

    Raises:
        ConfigError: If ``summary_tokens`` do not fit the model, or the prompt set is unknown.
        ModelError: If no summary fits the model's context, or the model was trained with unknown prompts.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        summary_tokens: int | None = None,
        prompts: PromptSet | str | None = None,
        format: AnswerFormat | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"must be positive, not {max_tokens}", field="max_tokens")
        self.name = backend.model
        self.interfaces = backend.capabilities.interfaces & {"summary"}
        self._backend = backend
        self._max_tokens, self._temperature, self._seed = max_tokens, temperature, seed
        if format is None:
            chosen = prompts_of(backend.model, prompts)
            limit = context_budget(
                backend, chosen.answer_messages("", ""), max_tokens, summary_tokens, field="summary_tokens"
            )
            format = QuotedSummary(backend.count_tokens, limit=limit, prompts=chosen)
        else:
            warn_of_other_templates(backend.model, format.template_hash)
        self.format: AnswerFormat = format

    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        """See :meth:`ConditionedGenerator.respond`."""
        return await self._backend.chat([self._request(item) for item in items])

    async def stream(self, item: Conditioned, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """See :meth:`ConditionedGenerator.stream`."""
        async with closing(self._backend.stream(self._request(item), on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(self, items: Sequence[Candidate]) -> list[ScoreResult]:
        """See :meth:`ConditionedGenerator.score`."""
        return await self._backend.score(
            [ScoreRequest(self._messages(item.given), item.response, item.given.user_id) for item in items]
        )

    def _request(self, item: Conditioned) -> ChatRequest:
        return ChatRequest(
            messages=self._messages(item),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=self._seed,
            user=item.user_id,
        )

    def _messages(self, item: Conditioned) -> list[Message]:
        return self.format.render(item.prompt, item.interface)
