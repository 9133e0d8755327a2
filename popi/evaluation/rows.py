"""The rows of a table: what a generator reads about each user.

A row is an entry of :data:`ROWS`, which builds a :class:`popi.roles.PreferenceInference`. To add a row, add an entry,
and a class for its inference.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from popi import registry
from popi.backends.base import Backend, InterfaceKind
from popi.data.example import PersonalizationExample
from popi.errors import BackendError, ConfigError, PopiError
from popi.roles import Failure, PreferenceInference
from popi.signals import UserId, UserSignals
from popi.summary import PreferenceSummary


class RowUnavailable(PopiError):
    """The data are not sufficient for a row. The table is made without the row, and names the reason."""


@dataclass(frozen=True, slots=True)
class Materials:
    """The inputs of the rows for one sample of users.

    Attributes:
        writer: The inference under test. It writes once per user, however many rows use the summaries.
        untrained: The inference that it was trained from; ``None`` if it was not trained.
        reader: The backend of the generator.
        examples: The users.
    """

    writer: PreferenceInference
    untrained: PreferenceInference | None
    reader: Backend
    examples: Sequence[PersonalizationExample]


@dataclass(frozen=True, slots=True)
class Row:
    """A row: the interface that a generator reads about each user.

    Attributes:
        name: Name on the command line and in results.
        build: Makes the inference, or raises :class:`RowUnavailable`. ``None`` is the plain prompt.
        interface: The kind of interface that the inference makes.
        claims: Whether the interface is a summary whose claims can be compared with the truth.
    """

    name: str
    build: Callable[[Materials], PreferenceInference] | None
    interface: InterfaceKind = "summary"
    claims: bool = True

    def accepted_by(self, reader: Backend) -> bool:
        """Whether a generator's backend declares that it accepts the interface of this row."""
        return self.build is None or self.interface in reader.capabilities.interfaces


class Written(BaseModel):
    """The summary of one user, or the reason why it failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: UserId
    summary: PreferenceSummary | None = None
    error: str = ""

    @classmethod
    def of(cls, outcome: PreferenceSummary | Failure) -> Written:
        """Makes the record of an outcome."""
        if isinstance(outcome, Failure):
            return cls(user_id=outcome.user_id, error=outcome.error)
        return cls(user_id=outcome.user_id, summary=outcome)

    def outcome(self) -> PreferenceSummary | Failure:
        """The outcome, inverse of :meth:`of`."""
        return self.summary or Failure(self.user_id, self.error)


class WrittenOnce(PreferenceInference):
    """Summaries that are written or read once, so that rows with the same writer share its summaries.

    Args:
        name: The name of the writer.
        have: Writes or reads the summaries of all users of a sample. It is called when the first one is needed.
    """

    def __init__(self, name: str, have: Callable[[], Awaitable[Sequence[Written]]]) -> None:
        self.name = name
        self._have = have
        self._written: dict[str, Written] = {}

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
        if not self._written:
            self._written = {written.user_id: written for written in await self._have()}
        return [self._written[user.user_id].outcome() for user in users]


def _raw(materials: Materials) -> PreferenceInference:
    """Raw signals, with room for the longest held-out pair: a pair that does not fit would count against them."""
    texts = [
        f"{pair.prompt}\n{response}"
        for example in materials.examples
        for pair in example.tests
        for response in (pair.chosen, pair.rejected)
    ]
    longest = materials.reader.count_tokens(max(texts, key=len))
    # A pair of more than half of the context does not fit under any row.
    half = (materials.reader.capabilities.context_length or 2 * longest) // 2
    usual = registry.inference_options("raw")["answer_tokens"]
    return registry.make_inference("raw", materials.reader, answer_tokens=max(usual, min(longest, half)))


def _oracle(which: Literal["evidence", "truth"]) -> Callable[[Materials], PreferenceInference]:
    def build(materials: Materials) -> PreferenceInference:
        texts = {example.user.user_id: example.oracles.get(which) for example in materials.examples}
        known = {user_id: text for user_id, text in texts.items() if text is not None}
        if len(known) < len(texts):
            raise RowUnavailable(f"{len(texts) - len(known)} of {len(texts)} users have no {which} oracle")
        return registry.inference("oracle")(known, name=f"{which} oracle")

    return build


def _trained(materials: Materials) -> PreferenceInference:
    if materials.untrained is None:
        raise RowUnavailable("the writer is an untrained one")
    return materials.writer


def _another_user(materials: Materials) -> PreferenceInference:
    if len(materials.examples) < 2:
        raise RowUnavailable("the data contain only one user")
    truths = {example.user.user_id: example.oracles.get("truth") for example in materials.examples}
    preferences = {user: truth for user, truth in truths.items() if truth is not None}
    return registry.inference("another-user")(materials.writer, preferences=preferences)


NO_CONTEXT = "no-context"
UNTRAINED, TRAINED = "untrained-summary", "popi-summary"

ROWS = (
    Row(NO_CONTEXT, None, claims=False),
    Row("raw-signals", _raw, claims=False),
    Row(UNTRAINED, lambda materials: materials.untrained or materials.writer),
    Row(TRAINED, _trained),
    Row("empty-summary", lambda materials: registry.inference("empty")(), claims=False),
    Row("another-users-summary", _another_user),
    Row("evidence-oracle", _oracle("evidence")),
    Row("true-taste-oracle", _oracle("truth")),
)

REFERENCES = (UNTRAINED, NO_CONTEXT)
"""The rows from which the differences of all other rows are computed."""


def choose(names: Sequence[str], *, trained: bool = False) -> tuple[Row, ...]:
    """Selects rows by name, in the order of the table.

    Args:
        names: Names of rows. Case, spaces, hyphens and apostrophes are ignored: ``Another user's summary`` is
            ``another-users-summary``. If empty, all rows that exist for the writer.
        trained: Whether the writer is a trained one.

    Raises:
        ConfigError: If a name is unknown.
    """
    known = {_letters(row.name): row.name for row in ROWS}
    wanted = set()
    for name in names:
        if _letters(name) not in known:
            rows = ", ".join(known.values())
            raise ConfigError(f"unknown row {name!r}", field="rows", fix=f"the rows are: {rows}")
        wanted.add(known[_letters(name)])
    return tuple(row for row in ROWS if (row.name in wanted if names else trained or row.name != TRAINED))


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())
