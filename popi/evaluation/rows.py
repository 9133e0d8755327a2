"""The rows of a table: what a generator is told of each user.

A row is an entry of :data:`ROWS` and a small class that makes a summary for each user, a
:class:`popi.roles.PreferenceInference`. A later row is one more of each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from popi import registry
from popi.backends.base import Backend
from popi.data.example import PersonalizationExample
from popi.errors import ConfigError, PopiError, did_you_mean
from popi.roles import PreferenceInference
from popi.signals import UserSignals
from popi.summary import PreferenceSummary


class RowUnavailable(PopiError):
    """The data lack what a row needs; the table is made without it and says why."""


@dataclass(frozen=True, slots=True)
class Materials:
    """What the rows of one sample of users are made from.

    Attributes:
        writer: The inference under test; it writes once for each user, however many rows ask.
        untrained: What it was before it was trained; ``None`` if it was not.
        reader: The model that will answer.
        examples: The users.
    """

    writer: PreferenceInference
    untrained: PreferenceInference | None
    reader: Backend
    examples: Sequence[PersonalizationExample]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to tell a generator of a user.

    Attributes:
        name: Names it on the command line and in tables.
        build: Makes the inference, or raises :class:`RowUnavailable`. ``None`` is the bare prompt.
        claims: Whether what it tells is a summary, whose claims can be held against the truth.
    """

    name: str
    build: Callable[[Materials], PreferenceInference] | None
    claims: bool = True


class WrittenOnce(PreferenceInference):
    """Summaries that are had once, so that rows which share a writer share what it wrote.

    Args:
        name: The writer's.
        have: Writes or reads the summaries of all users of a sample; called when the first of them is asked for.
    """

    def __init__(self, name: str, have: Callable[[], Awaitable[Sequence[PreferenceSummary]]]) -> None:
        self.name = name
        self._have = have
        self._written: dict[str, PreferenceSummary] = {}

    async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
        """Returns one summary a user."""
        if not self._written:
            self._written = {summary.user_id: summary for summary in await self._have()}
        return [self._written[user.user_id] for user in users]


def _raw(materials: Materials) -> PreferenceInference:
    """Raw signals leave room for the longest test pair: a pair that cannot be scored would count against them."""
    texts = [
        f"{pair.prompt}\n{answer}"
        for example in materials.examples
        for pair in example.tests
        for answer in (pair.chosen, pair.rejected)
    ]
    longest = materials.reader.count_tokens(max(texts, key=len))
    # What takes more than half of the context is too long for every row.
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
        raise RowUnavailable("there is no other user")
    return registry.inference("another-user")(materials.writer)


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
"""The rows from which every other row's difference is told."""


def choose(names: Sequence[str], *, trained: bool = False) -> tuple[Row, ...]:
    """The rows of these names, in the order of the table; when none is named, all that there are for the writer.

    Args:
        names: Of rows.
        trained: Whether the writer is a trained one.

    Raises:
        ConfigError: If there is no row of a name.
    """
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown row {name!r}", field="rows", fix=did_you_mean(name, known))
    wanted = names or [name for name in known if trained or name != TRAINED]
    return tuple(row for row in ROWS if row.name in wanted)
