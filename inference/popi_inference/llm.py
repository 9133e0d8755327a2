"""Preference inference by a language model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from popi.backends.base import Backend, ChatRequest, ChatResult
from popi.errors import BackendError, ConfigError
from popi.prompts import PromptSet
from popi.roles import Failure, PreferenceInference, SummaryFormat, SummaryPrompt, context_budget
from popi.signals import UserSignals
from popi.summary import Author, PreferenceSummary, Provenance, summarize_claims
from popi.trained import prompts_of, warn_of_other_templates
from popi_inference.format import AUTO, SAME_LANGUAGE, PromptedSummary

RETRY_TEMPERATURE = 0.7
"""Minimum sampling temperature of another attempt after a reply that is not a summary."""


class LLMSummarizer(PreferenceInference):
    """Infers the summary of each user with a language model.

    A user without evidence gets the summary "not enough evidence" without a request. A reply that is not a summary (an
    echo, a repetition, no claim) is requested again with another seed at a positive temperature.

    Example:
        >>> import asyncio
        >>> from popi import Statement
        >>> from popi.testing import ScriptedBackend
        >>> user = UserSignals(user_id="ann", signals=(Statement(id="s1", text="I like short answers."),))
        >>> inference = LLMSummarizer(ScriptedBackend(lambda request: "- short answers [1]"))
        >>> [summary] = asyncio.run(inference.infer([user]))
        >>> summary.text, summary.claims[0].evidence
        ('- short answers', ('s1',))

    Args:
        backend: The model.
        max_tokens: Maximum number of tokens of a summary.
        temperature: Sampling temperature; 0 is greedy.
        budget: Maximum number of tokens of rendered signals; ``None`` uses as many as fit the model's context.
        seed: Seed for sampling. A user's summary does not depend on the other users.
        language: The language of the summaries, by its English name. ``auto`` is that of the user's own words; ``None``
            requests none.
        attempts: Maximum number of requests per user.
        prompts: A prompt set, or its name; ``None`` is the set that the model was trained with, else the default.
        format: Renders requests and reads replies, in place of the default format.

    Raises:
        ConfigError: If the budget does not fit the model, or the prompt set is unknown.
        ModelError: If no signal fits the model's context, or the model was trained with unknown prompts.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        budget: int | None = None,
        seed: int = 0,
        language: str | None = AUTO,
        attempts: int = 2,
        prompts: PromptSet | str | None = None,
        format: SummaryFormat | None = None,
    ) -> None:
        for field, value in {"max_tokens": max_tokens, "attempts": attempts}.items():
            if value < 1:
                raise ConfigError(f"must be positive, not {value}", field=field)
        self.name = backend.model
        self._backend = backend
        self._max_tokens, self._temperature, self._seed, self._attempts = max_tokens, temperature, seed, attempts
        if format is None:
            chosen = prompts_of(backend.model, prompts)
            frame = chosen.inference_messages("", language=SAME_LANGUAGE if language == AUTO else language)
            format = PromptedSummary(
                backend.count_tokens,
                budget=context_budget(backend, frame, max_tokens, budget),
                max_tokens=max_tokens,
                language=language,
                prompts=chosen,
            )
        else:
            warn_of_other_templates(backend.model, format.template_hash)
        self.format: SummaryFormat = format

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`."""
        summaries = []
        for outcome in await self.try_infer(users):
            if isinstance(outcome, Failure):
                raise BackendError(f"no summary of user {outcome.user_id!r}: {outcome.error}")
            summaries.append(outcome)
        return summaries

    async def try_infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary | Failure]:
        """See :meth:`PreferenceInference.try_infer`."""
        prompts = [self.format.render(user) for user in users]
        outcomes: dict[int, PreferenceSummary | Failure] = {
            place: self._no_evidence(users[place]) for place, prompt in enumerate(prompts) if prompt is None
        }
        pending = [place for place in range(len(users)) if place not in outcomes]
        for attempt in range(self._attempts):
            requests = {place: prompt for place in pending if (prompt := prompts[place]) is not None}
            results = await self._backend.chat([self._request(prompt, attempt) for prompt in requests.values()])
            pending = []
            for (place, prompt), result in zip(requests.items(), results, strict=True):
                outcomes[place] = outcome = self._read(prompt, result)
                if isinstance(outcome, Failure) and result.error is None:
                    pending.append(place)
            if not pending:
                break
        return [outcomes[place] for place in range(len(users))]

    def _request(self, prompt: SummaryPrompt, attempt: int) -> ChatRequest:
        name = f"{self._seed}:{prompt.user.user_id}" + (f":{attempt}" if attempt else "")
        digest = hashlib.sha256(name.encode()).digest()
        return ChatRequest(
            messages=prompt.messages,
            max_tokens=self._max_tokens,
            temperature=max(self._temperature, RETRY_TEMPERATURE) if attempt else self._temperature,
            seed=int.from_bytes(digest[:4], "big") >> 1,
            user=prompt.user.user_id,
        )

    def _read(self, prompt: SummaryPrompt, result: ChatResult) -> PreferenceSummary | Failure:
        if result.error is not None:
            return Failure(prompt.user.user_id, result.error, result.failure)
        outcome = self.format.parse(prompt, result.text, truncated=result.finish_reason == "length")
        if isinstance(outcome, Failure):
            return outcome
        tokens = self._backend.count_tokens(outcome.text)
        made = outcome.provenance.model_copy(update={"model": self.name, "tokens": tokens})
        return outcome.model_copy(update={"provenance": made})

    def _no_evidence(self, user: UserSignals) -> PreferenceSummary:
        made = Provenance(
            author=Author.INFERRED,
            model=self.name,
            template_hash=self.format.template_hash,
            signals_digest=user.digest(),
        )
        return summarize_claims(user.user_id, (), made)
