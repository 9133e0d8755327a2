"""The controls of every table: interfaces that no model has written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from popi.backends.base import Backend
from popi.claims import parse_claims
from popi.errors import InputError
from popi.prompts import DEFAULT
from popi.render import render_signals
from popi.roles import Failure, PreferenceInference, context_budget
from popi.signals import UserSignals
from popi.summary import NO_EVIDENCE, Author, PreferenceSummary, Provenance

ANSWER_TOKENS = 256
"""Room for a written answer."""


class RawSignals(PreferenceInference):
    """The signals themselves in the place of a summary.

    Args:
        backend: The model that will answer under them; its tokenizer counts.
        budget: The most tokens of rendered signals; ``None`` takes what the model's context has room for.
        answer_tokens: Room that is left for the prompt and its answer.

    Raises:
        ConfigError: If the budget does not fit the model.
        ModelError: If the model's context has no room for any signal.
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
            provenance=_provenance(self.name, user, tokens=rendered.tokens),
        )


class Empty(PreferenceInference):
    """A summary without a word: what the frame alone does to a generator."""

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
    """The summary of another user: what any summary does, whoever it speaks of.

    The users are put in a ring by chance and each gets the summary of the next, so nobody gets their own and
    every summary is used once.

    Args:
        inner: Writes the summaries.
        seed: Decides who gets whose; the order in which users are given does not.
    """

    def __init__(self, inner: PreferenceInference, *, seed: int = 0) -> None:
        self.name = f"another user's summary by {inner.name}"
        self._inner = inner
        self._seed = seed

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`; the digest in the provenance is that of the signals read.

        Raises:
            InputError: If there is only one user.
        """
        summaries = await self._inner.infer(users)
        return [self._hand_over(summaries[donor], user.user_id) for donor, user in self._donors(users)]

    async def try_infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary | Failure]:
        """See :meth:`PreferenceInference.try_infer`; a failed summary is missing for the user who would get it."""
        outcomes = await self._inner.try_infer(users)
        handed: list[PreferenceSummary | Failure] = []
        for donor, user in self._donors(users):
            found = outcomes[donor]
            if isinstance(found, Failure):
                handed.append(Failure(user.user_id, found.error, found.failure))
            else:
                handed.append(self._hand_over(found, user.user_id))
        return handed

    def _donors(self, users: Sequence[UserSignals]) -> list[tuple[int, UserSignals]]:
        """The users, each with the place of the one whose summary they get."""
        if len(users) == 1:
            raise InputError("there is no other user whose summary could be taken", fix="give two or more users")
        ring = sorted(range(len(users)), key=lambda place: self._rank(users[place].user_id))
        donors = dict(zip(ring, ring[1:] + ring[:1], strict=True))
        return [(donors[place], user) for place, user in enumerate(users)]

    def _rank(self, user_id: str) -> bytes:
        return hashlib.sha256(f"{self._seed}:{user_id}".encode()).digest()

    def _hand_over(self, summary: PreferenceSummary, user_id: str) -> PreferenceSummary:
        provenance = summary.provenance.model_copy(update={"author": Author.BASELINE, "model": self.name})
        return summary.model_copy(update={"user_id": user_id, "provenance": provenance})


class Oracle(PreferenceInference):
    """Summaries that are known beforehand, by user.

    Args:
        texts: The summary of each user id.
        name: Which oracle this is.
    """

    def __init__(self, texts: Mapping[str, str], *, name: str = "oracle") -> None:
        self.name = name
        self._texts = texts

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """See :meth:`PreferenceInference.infer`.

        Raises:
            InputError: If the oracle does not know a user.
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
