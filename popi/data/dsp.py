"""Domain-Specific Preference: queries with one response for each of four audiences (Linear95/DSP, arXiv 2309.03126).

An audience is a user: for each query they prefer the response written for them to a response written for another
audience. The data set also has generic responses. They are not used, because their shorter length would give them away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random

from pydantic import ConfigDict

from popi.claims import as_text
from popi.data.convert import Conversion, Dropped, check_any, divide, read_records
from popi.data.example import HeldOutPair, PersonalizationExample, text_key
from popi.errors import InputError
from popi.io import validate
from popi.signals import FileRecord, PreferencePair, Text, UserSignals
from popi.summary import Claim

AUDIENCES = {
    "academy": "academia",
    "business": "business",
    "entertainment": "entertainment",
    "literature": "literature and the arts",
}
"""The audiences by their names in the data, and in words."""

FILES = "domain_specific_preference*.json"
"""Pattern of the publisher's files in a folder."""


class _Responses(FileRecord):
    model_config = ConfigDict(extra="ignore")

    academy: Text
    business: Text
    entertainment: Text
    literature: Text


class _Record(FileRecord):
    model_config = ConfigDict(extra="ignore")

    query: Text
    responses: _Responses


@dataclass(frozen=True, slots=True)
class _Query:
    """A usable record and its place."""

    file: str
    index: int
    record: _Record

    def by(self, audience: str) -> str:
        response: str = getattr(self.record.responses, audience)
        return response

    def others(self, audience: str) -> list[str]:
        """The different responses of the other audiences."""
        own = self.by(audience)
        responses = {text_key(text): text for other in AUDIENCES if (text := self.by(other)) != own}
        return list(responses.values())

    def drop(self, reason: str, field: str) -> Dropped:
        return Dropped(reason, self.file, self.index, field=field)


@dataclass(frozen=True, slots=True)
class _Users:
    """Which users are made. The fields are the arguments of :func:`convert_dsp`."""

    signals: int
    tests: int
    rejected: int
    seed: int

    def __post_init__(self) -> None:
        if self.signals < 1 or self.tests < 0:
            raise InputError(f"a user cannot have {self.signals} signals and {self.tests} held-out pairs")
        if not 1 <= self.rejected < len(AUDIENCES):
            raise InputError(f"a query cannot have {self.rejected} rejected responses", fix="request 1 to 3")

    @property
    def size(self) -> int:
        """Number of queries of a user."""
        return self.signals + self.tests


def convert_dsp(
    path: Path, *, signals_per_user: int = 4, tests_per_user: int = 4, rejected_per_test: int = 1, seed: int = 0
) -> Conversion:
    """Makes users from the preferences of the audiences, many from each audience.

    For each audience, the queries are shuffled and divided into blocks, one per user, so that no two users of an
    audience share a query. They do share their preferences: a confidence interval by user is about these four
    preferences only. Users of different audiences share queries.

    Args:
        path: One of the publisher's files ``domain_specific_preference.*.json``, or a folder with some of them.
        signals_per_user: Number of pairs in the signals of a user, each of another query.
        tests_per_user: Number of queries in the held-out pairs of a user.
        rejected_per_test: Number of held-out pairs of such a query, 1 to 3. Each rejects the response of another
            audience. There are fewer for a query for which some audiences have the same response.
        seed: Determines which user gets which queries, and the rejected responses.

    Raises:
        InputError: If the files are not in this format, an argument is out of range, or there are too few queries.
    """
    users = _Users(signals_per_user, tests_per_user, rejected_per_test, seed)
    queries, dropped = _read(path)
    made = _convert(path, queries, users)
    return Conversion(made.examples, (*dropped, *made.dropped))


def split_dsp(
    path: Path,
    *,
    fraction: float,
    signals_per_user: int = 4,
    tests_per_user: int = 4,
    rejected_per_test: int = 1,
    seed: int = 0,
) -> tuple[Conversion, Conversion]:
    """Makes users for training and users for evaluation, who have no query in common.

    The queries are divided before users are made of them, in the same way for every audience: a query of an evaluation
    user is in no signal and in no held-out pair of any training user. The division depends on the queries, the fraction
    and the seed only, so that files with other numbers of signals or tests fit each other.

    Args:
        path: As for :func:`convert_dsp`, like the other arguments.
        fraction: Fraction of the queries that are for evaluation.
        signals_per_user: Number of pairs in the signals of a user.
        tests_per_user: Number of queries in the held-out pairs of a user.
        rejected_per_test: Number of held-out pairs of such a query.
        seed: Also determines which queries are for evaluation.

    Returns:
        The users for training and the users for evaluation. What was dropped before the division is in the first.

    Raises:
        InputError: If the files are not in this format, an argument is out of range, or there are too few queries.
    """
    users = _Users(signals_per_user, tests_per_user, rejected_per_test, seed)
    queries, dropped = _read(path)
    train, evaluation = divide(queries, lambda query: [query.record.query], fraction=fraction, seed=seed, file=path)
    made = _convert(path, train, users, "training")
    return Conversion(made.examples, (*dropped, *made.dropped)), _convert(path, evaluation, users, "evaluation")


def _convert(path: Path, queries: Sequence[_Query], users: _Users, part: str = "") -> Conversion:
    """Makes users of some queries. The ids of users for evaluation do not occur among those for training."""
    examples: list[PersonalizationExample] = []
    dropped = [
        query.drop("two responses are the same text", f"responses.{one} and {other}")
        for query in queries
        for one, other in combinations(AUDIENCES, 2)
        if query.by(one) == query.by(other)
    ]
    for audience in AUDIENCES:
        usable = [query for query in queries if query.others(audience)]
        dropped += [
            query.drop("no other audience has a different response", f"responses.{audience}")
            for query in queries
            if not query.others(audience)
        ]
        rng = Random(f"{users.seed}/{audience}")
        rng.shuffle(usable)
        prefix = f"{audience}-eval" if part == "evaluation" else audience
        for number, start in enumerate(range(0, len(usable) - users.size + 1, users.size)):
            block = usable[start : start + users.size]
            examples.append(_example(rng, audience, f"{prefix}-{number:03d}", block, users))
        left = usable[len(usable) // users.size * users.size :]
        dropped += [
            query.drop("too few queries are left for another user", f"responses.{audience}")
            for query in sorted(left, key=queries.index)
        ]
    if not examples:
        raise InputError(
            f"contains {len(queries)} queries{part and f' for {part}'}, too few for a user of {users.size}",
            file=path,
            fix="request fewer signals or held-out pairs per user",
        )
    return Conversion(tuple(examples), tuple(dropped))


def _read(path: Path) -> tuple[list[_Query], list[Dropped]]:
    """The usable records, and the dropped ones."""
    files, dropped = _find(path)
    queries: list[_Query] = []
    known: set[str] = set()
    for file in files:
        for index, value in enumerate(read_records(file, of="queries with responses")):
            try:
                query = _Query(file.name, index, validate(_Record, value))
            except InputError as error:
                dropped.append(Dropped(error.what, file.name, index, field=error.field or ""))
                continue
            key = text_key(query.record.query)
            if key in known:
                dropped.append(query.drop("repeats an earlier query", "query"))
                continue
            known.add(key)
            queries.append(query)
    check_any(path, queries, dropped, what="queries with responses", fix="give the publisher's files unchanged")
    return queries, dropped


def _find(path: Path) -> tuple[list[Path], list[Dropped]]:
    if not path.is_dir():
        return [path], []
    files = sorted(path.rglob(FILES))
    others = [Dropped(f"is not {FILES}", file.name) for file in sorted(path.rglob("*.json")) if file not in files]
    return files, others


def _example(
    rng: Random, audience: str, user_id: str, block: Sequence[_Query], users: _Users
) -> PersonalizationExample:
    pairs = [
        [
            HeldOutPair(prompt=query.record.query, chosen=query.by(audience), rejected=response)
            for response in rng.sample(others, min(len(others), 1 if place < users.signals else users.rejected))
        ]
        for place, query in enumerate(block)
        if (others := query.others(audience))
    ]
    truth = Claim(text=f"answers as somebody in {AUDIENCES[audience]} would give them")
    return PersonalizationExample(
        user=UserSignals(
            user_id=user_id,
            signals=tuple(PreferencePair(origin="dsp", **pair.model_dump()) for (pair,) in pairs[: users.signals]),
        ),
        tests=tuple(pair for query in pairs[users.signals :] for pair in query),
        oracles={"truth": as_text([truth])},
        facts={"dataset": "dsp", "audience": audience},
    )
