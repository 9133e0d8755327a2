"""A language model as the writer of summaries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from popi.backends.base import Backend, ChatRequest, ChatResult
from popi.errors import BackendError
from popi.prompts import inference_messages, template_hash
from popi.render import RenderedSignals, render_signals
from popi.roles import Failure, PreferenceInference, context_tokens
from popi.signals import UserSignals
from popi.summary import (
    Author,
    Claim,
    PreferenceSummary,
    Provenance,
    cap_tokens,
    finished_part,
    read_reply,
    summarize_claims,
)


class LLMSummarizer(PreferenceInference):
    """Asks a model for a summary of each user's signals.

    A user without a signal of their own taste gets "not enough evidence" without the model being asked.

    Args:
        backend: The model.
        max_tokens: The most tokens of a summary. The claim that a model was still writing then is left out, unless
            it is the only one: half a claim can say the opposite.
        temperature: 0 is greedy.
        budget: The most tokens of rendered signals; ``None`` takes what the model's context has room for.
        seed: Seeds the sampling, for each user alike whoever else is asked for.

    Raises:
        ConfigError: If the budget does not fit the model.
        ModelError: If the model's context has no room for any signal.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        budget: int | None = None,
        seed: int = 0,
    ) -> None:
        self.name = backend.model
        self._backend = backend
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._budget = context_tokens(backend, inference_messages(""), max_tokens, budget)
        self._seed = seed

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`."""
        outcomes = await self.try_infer(users)
        summaries = [outcome for outcome in outcomes if isinstance(outcome, PreferenceSummary)]
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                raise BackendError(f"no summary of user {outcome.user_id!r}: {outcome.error}")
        return summaries

    async def try_infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary | Failure]:
        """See :meth:`PreferenceInference.try_infer`."""
        asked = {
            place: render_signals(user.signals, self._backend.count_tokens, self._budget)
            for place, user in enumerate(users)
            if any(signal.is_evidence for signal in user.signals)
        }
        requests = [self._request(users[place], rendered) for place, rendered in asked.items()]
        results = dict(zip(asked, await self._backend.chat(requests) if requests else [], strict=True))
        return [
            self._read(user, asked[place], results[place]) if place in asked else self._no_evidence(user)
            for place, user in enumerate(users)
        ]

    def _request(self, user: UserSignals, rendered: RenderedSignals) -> ChatRequest:
        digest = hashlib.sha256(f"{self._seed}:{user.user_id}".encode()).digest()
        return ChatRequest(
            messages=inference_messages(rendered.text),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=int.from_bytes(digest[:4], "big") >> 1,
            user=user.user_id,
        )

    def _read(self, user: UserSignals, rendered: RenderedSignals, result: ChatResult) -> PreferenceSummary | Failure:
        if result.error is not None:
            return Failure(user.user_id, result.error)
        reply = finished_part(result.text) if result.finish_reason == "length" else result.text
        reply = cap_tokens(reply, self._backend.count_tokens, self._max_tokens)
        summary = read_reply(user.user_id, reply, rendered.shown, self._provenance(user))
        tokens = self._backend.count_tokens(summary.text)
        return summary.model_copy(
            update={
                "claims": tuple(_by_the_user(claim, user) for claim in summary.claims),
                "provenance": summary.provenance.model_copy(update={"tokens": tokens}),
            }
        )

    def _no_evidence(self, user: UserSignals) -> PreferenceSummary:
        return summarize_claims(user.user_id, (), self._provenance(user))

    def _provenance(self, user: UserSignals) -> Provenance:
        return Provenance(
            author=Author.INFERRED,
            model=self.name,
            template_hash=template_hash(),
            signals_digest=user.digest(),
        )


def _by_the_user(claim: Claim, user: UserSignals) -> Claim:
    """The claim without citations of what somebody else said, which shows nothing of the user's taste."""
    own = {signal.id for signal in user.signals if signal.is_evidence}
    return claim.model_copy(update={"evidence": tuple(cited for cited in claim.evidence if cited in own)})
