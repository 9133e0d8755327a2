"""Baselines: interfaces that no model wrote. They are the controls of every table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from popi.backends.base import Backend
from popi.claims import parse_claims
from popi.errors import InputError
from popi.prompts import DEFAULT
from popi.render import render_signals
from popi.roles import Failure, PreferenceInference, context_budget
from popi.signals import UserSignals
from popi.summary import NO_EVIDENCE, Author, PreferenceSummary, Provenance

ANSWER_TOKENS = 256
"""Number of tokens to leave for the response."""


class RawSignals(PreferenceInference):
    """Uses the rendered signals in place of a summary.

    Example:
        >>> import asyncio
        >>> from popi import Statement
        >>> from popi.testing import ScriptedBackend
        >>> user = UserSignals(user_id="ann", signals=(Statement(text="I like short answers."),))
        >>> [summary] = asyncio.run(RawSignals(ScriptedBackend()).infer([user]))
        >>> summary.text
        '[1] said: I like short answers.'

    Args:
        backend: The model that responds under the signals. Tokens are counted with its tokenizer.
        budget: Maximum number of tokens of the rendered signals; ``None`` uses the context of the model.
        answer_tokens: Number of tokens to leave for the prompt and its response.

    Raises:
        ConfigError: If the budget does not fit into the context of the model.
        ModelError: If no signal fits into the context of the model.
    """

    name = "raw signals"

    def __init__(self, backend: Backend, *, budget: int | None = None, answer_tokens: int = ANSWER_TOKENS) -> None:
        self._backend = backend
        self._budget = context_budget(backend, DEFAULT.answer_messages("", ""), answer_tokens, budget)

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`."""
        return [self._render(user) for user in users]

    def _render(self, user: UserSignals) -> PreferenceSummary:
        rendered = render_signals(user.chronological(), self._backend.count_tokens, self._budget)
        return PreferenceSummary(
            user_id=user.user_id,
            text=rendered.text or NO_EVIDENCE,
            status="ok" if rendered.text else "not_enough_evidence",
            provenance=_provenance(self.name, user, tokens=self._backend.count_tokens(rendered.text)),
        )


class Empty(PreferenceInference):
    """Gives every user an empty summary, to measure the effect of the frame of the prompt.

    Example:
        >>> import asyncio
        >>> [summary] = asyncio.run(Empty().infer([UserSignals(user_id="ann")]))
        >>> summary.text
        ''
    """

    name = "empty summary"

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`."""
        return [
            PreferenceSummary(
                user_id=user.user_id,
                text="",
                status="not_enough_evidence",
                provenance=_provenance(self.name, user),
            )
            for user in users
        ]


class AnotherUsers(PreferenceInference):
    """Gives every user the summary of another user, to measure the effect of a summary that does not fit.

    The users are arranged in a random ring, and each gets the summary of the next one. So every summary is used once,
    and no user gets their own. If the preferences are known, no user gets the summary of
    a user with the same ones, unless every assignment would have such a pair.

    Example:
        >>> import asyncio
        >>> users = [UserSignals(user_id="ann"), UserSignals(user_id="ben")]
        >>> others = AnotherUsers(Oracle({"ann": "- likes tea", "ben": "- likes coffee"}))
        >>> [summary.text for summary in asyncio.run(others.infer(users))]
        ['- likes coffee', '- likes tea']

    Args:
        inner: Writes the summaries.
        seed: Seed of the ring. The ring does not depend on the order of the users.
        preferences: The true preferences by user id, as far as they are known.
    """

    def __init__(
        self, inner: PreferenceInference, *, seed: int = 0, preferences: Mapping[str, str] | None = None
    ) -> None:
        self.name = f"another user's summary by {inner.name}"
        self._inner = inner
        self._seed, self._preferences = seed, preferences or {}

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`. The signals digest in the provenance is that of the other user.

        Raises:
            InputError: If there is only one user.
        """
        summaries = await self._inner.infer(users)
        return [self._assign(summaries[donor], user.user_id) for donor, user in self._donors(users)]

    async def try_infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary | Failure]:
        """See :meth:`PreferenceInference.try_infer`. A summary that failed is a failure for the user who would get it.

        Raises:
            InputError: If there is only one user.
        """
        outcomes = await self._inner.try_infer(users)
        return [
            replace(outcome, user_id=user.user_id)
            if isinstance(outcome := outcomes[donor], Failure)
            else self._assign(outcome, user.user_id)
            for donor, user in self._donors(users)
        ]

    def _donors(self, users: Sequence[UserSignals]) -> list[tuple[int, UserSignals]]:
        """Each user with the index of the user whose summary they get."""
        if len(users) == 1:
            raise InputError(
                "this baseline needs the summary of another user, and got only one user", fix="give two or more users"
            )
        ring = sorted(range(len(users)), key=lambda index: self._rank(users[index].user_id))
        donors = dict(zip(ring, ring[1:] + ring[:1], strict=True))

        def fits(user: int, donor: int) -> bool:
            one, other = users[user].user_id, users[donor].user_id
            return user != donor and self._preferences.get(one, f"of {one}") != self._preferences.get(other)

        for user in ring:
            if not fits(user, donors[user]):
                swaps = (other for other in ring if fits(user, donors[other]) and fits(other, donors[user]))
                other = next(swaps, user)
                donors[user], donors[other] = donors[other], donors[user]
        return [(donors[index], user) for index, user in enumerate(users)]

    def _rank(self, user_id: str) -> bytes:
        return hashlib.sha256(f"{self._seed}:{user_id}".encode()).digest()

    def _assign(self, summary: PreferenceSummary, user_id: str) -> PreferenceSummary:
        provenance = summary.provenance.model_copy(update={"author": Author.BASELINE, "model": self.name})
        return summary.model_copy(update={"user_id": user_id, "provenance": provenance})


class Oracle(PreferenceInference):
    """Gives every user a known summary.

    Example:
        >>> import asyncio
        >>> oracle = Oracle({"ann": "- likes tea"})
        >>> [summary] = asyncio.run(oracle.infer([UserSignals(user_id="ann")]))
        >>> [claim.text for claim in summary.claims]
        ['likes tea']

    Args:
        texts: Summaries by user id.
        name: Name of the oracle.
    """

    def __init__(self, texts: Mapping[str, str], *, name: str = "oracle") -> None:
        self.name = name
        self._texts = texts

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`.

        Raises:
            InputError: If a user has no summary.
        """
        return [self._look_up(user) for user in users]

    def _look_up(self, user: UserSignals) -> PreferenceSummary:
        text = self._texts.get(user.user_id)
        if text is None:
            raise InputError(f"{self.name} has no summary of user {user.user_id!r}")
        claims = parse_claims(text)
        return PreferenceSummary(
            user_id=user.user_id,
            text=text,
            claims=claims,
            status="ok" if claims else "not_enough_evidence",
            provenance=_provenance(self.name, user, author=Author.ORACLE),
        )


def _provenance(name: str, user: UserSignals, *, author: Author = Author.BASELINE, tokens: int = 0) -> Provenance:
    return Provenance(
        author=author,
        model=name,
        template_hash=DEFAULT.hash,
        signals_digest=user.digest(),
        tokens=tokens,
    )
