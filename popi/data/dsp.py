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
from popi.data.convert import Conversion, Dropped, check_any, read_records
from popi.data.example import HeldOutPair, PersonalizationExample
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
        """The audiences with a different response."""
        return [other for other in AUDIENCES if self.by(other) != self.by(audience)]

    def drop(self, reason: str, field: str) -> Dropped:
        return Dropped(reason, self.file, self.index, field=field)


def convert_dsp(path: Path, *, signals_per_user: int = 4, tests_per_user: int = 4, seed: int = 0) -> Conversion:
    """Makes users from the preferences of the audiences, many from each audience.

    For each audience, the queries are shuffled and divided into blocks, one per user, so that no two users of an
    audience share a query. They do share their preferences: a confidence interval by user is about these four
    preferences only.

    Args:
        path: One of the publisher's files ``domain_specific_preference.*.json``, or a folder with some of them.
        signals_per_user: Number of pairs in the signals of a user.
        tests_per_user: Number of held-out pairs of a user.
        seed: Determines which user gets which queries, and the rejected responses.

    Raises:
        InputError: If the files are not in this format, an argument is out of range, or there are too few queries.
    """
    if signals_per_user < 1 or tests_per_user < 0:
        raise InputError(f"a user cannot have {signals_per_user} signals and {tests_per_user} held-out pairs")
    size = signals_per_user + tests_per_user
    queries, dropped = _read(path)
    examples: list[PersonalizationExample] = []
    for audience in AUDIENCES:
        usable = [query for query in queries if query.others(audience)]
        dropped += [
            query.drop("no other audience has a different response", f"responses.{audience}")
            for query in queries
            if not query.others(audience)
        ]
        rng = Random(f"{seed}/{audience}")
        rng.shuffle(usable)
        for number, start in enumerate(range(0, len(usable) - size + 1, size)):
            examples.append(_example(rng, audience, number, usable[start : start + size], signals_per_user))
        left = usable[len(usable) // size * size :]
        dropped += [
            query.drop("too few queries are left for another user", f"responses.{audience}")
            for query in sorted(left, key=queries.index)
        ]
    if not examples:
        raise InputError(
            f"contains {len(queries)} queries, too few for a user of {size}",
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
            words = " ".join(query.record.query.split())
            if words in known:
                dropped.append(query.drop("repeats an earlier query", "query"))
                continue
            known.add(words)
            queries.append(query)
            for one, other in combinations(AUDIENCES, 2):
                if query.by(one) == query.by(other):
                    dropped.append(query.drop("two responses are the same text", f"responses.{one} and {other}"))
    check_any(path, queries, dropped, what="queries with responses", fix="give the publisher's files unchanged")
    return queries, dropped


def _find(path: Path) -> tuple[list[Path], list[Dropped]]:
    if not path.is_dir():
        return [path], []
    files = sorted(path.rglob(FILES))
    others = [Dropped(f"is not {FILES}", file.name) for file in sorted(path.rglob("*.json")) if file not in files]
    return files, others


def _example(rng: Random, audience: str, number: int, block: Sequence[_Query], signals: int) -> PersonalizationExample:
    pairs = [
        HeldOutPair(
            prompt=query.record.query, chosen=query.by(audience), rejected=query.by(rng.choice(query.others(audience)))
        )
        for query in block
    ]
    truth = Claim(text=f"answers as somebody in {AUDIENCES[audience]} would give them")
    return PersonalizationExample(
        user=UserSignals(
            user_id=f"{audience}-{number:03d}",
            signals=tuple(PreferencePair(origin="dsp", **pair.model_dump()) for pair in pairs[:signals]),
        ),
        tests=tuple(pairs[signals:]),
        oracles={"truth": as_text([truth])},
        facts={"dataset": "dsp", "audience": audience},
    )
