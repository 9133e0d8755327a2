"""Domain-Specific Preference: queries that were each answered for four audiences (Linear95/DSP, arXiv 2309.03126).

An audience is a user: for each of some queries they prefer the answer that was written for them to one that was written
for another audience. The plain answers are much shorter than the others, so they are no fair dispreferred side and are
not used.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from random import Random

from pydantic import BaseModel, ConfigDict

from popi.claims import as_text
from popi.data.convert import Conversion, Dropped, check_any, read_records
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.errors import InputError
from popi.io import validate
from popi.signals import PreferencePair, Text, UserSignals
from popi.summary import Claim

AUDIENCES = {
    "academy": "academia",
    "business": "business",
    "entertainment": "entertainment",
    "literature": "literature and the arts",
}
"""The audiences as the data name them, and in words."""


class _Responses(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)

    academy: Text
    business: Text
    entertainment: Text
    literature: Text


class _Record(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)

    query: Text
    responses: _Responses

    def by(self, audience: str) -> str:
        answer: str = getattr(self.responses, audience)
        return answer

    def others(self, audience: str) -> list[str]:
        """The audiences whose answer is another text."""
        return [other for other in AUDIENCES if self.by(other) != self.by(audience)]


def convert_dsp(path: Path, *, signals_per_user: int = 4, tests_per_user: int = 4, seed: int = 0) -> Conversion:
    """Makes users of an audience's preferences, many of each audience.

    The queries are shuffled for each audience and dealt out in blocks, one a user, so no two users of an audience share
    a query. Users of one audience share a taste all the same: an interval by user speaks of these four tastes alone.

    Args:
        path: ``domain_specific_preference.*.json`` as its publisher made it.
        signals_per_user: Pairs that a user shows.
        tests_per_user: Pairs that a user is tested on.
        seed: Another seed deals the queries otherwise and chooses other dispreferred answers.

    Raises:
        InputError: If the file is not what it should be, a number makes no sense, or there are too few queries.
    """
    if signals_per_user < 1 or tests_per_user < 0:
        raise InputError(f"a user cannot have {signals_per_user} signals and {tests_per_user} tests")
    size = signals_per_user + tests_per_user
    records, dropped = _read(path)
    check_any(path, records, dropped, what="query with its responses")
    examples: list[PersonalizationExample] = []
    for audience in AUDIENCES:
        usable = [index for index, record in records.items() if record.others(audience)]
        dropped += [
            Dropped("no other audience's answer is another text", path.name, index, f"responses.{audience}")
            for index, record in records.items()
            if not record.others(audience)
        ]
        rng = Random(f"{seed}/{audience}")
        rng.shuffle(usable)
        for number, start in enumerate(range(0, len(usable) - size + 1, size)):
            block = [records[index] for index in usable[start : start + size]]
            examples.append(_example(rng, audience, number, block, signals_per_user))
        left = usable[len(usable) // size * size :]
        dropped += [
            Dropped("too few queries are left for one more user", path.name, index, f"responses.{audience}")
            for index in sorted(left)
        ]
    if not examples:
        raise InputError(
            f"has {len(records)} queries, too few for a user of {size}",
            file=path,
            fix="ask for fewer signals or tests of a user",
        )
    return Conversion(tuple(examples), tuple(dropped))


def _read(path: Path) -> tuple[dict[int, _Record], list[Dropped]]:
    """The usable records by their place, and what is not usable."""
    records: dict[int, _Record] = {}
    dropped: list[Dropped] = []
    places: dict[str, int] = {}
    for index, value in enumerate(read_records(path, holds="queries with their responses")):
        try:
            record = validate(_Record, value)
        except InputError as error:
            dropped.append(Dropped(error.what, path.name, index, error.field or ""))
            continue
        if record.query in places:
            dropped.append(Dropped("the same query stands before", path.name, index, "query"))
            continue
        places[record.query] = index
        records[index] = record
        for one, other in combinations(AUDIENCES, 2):
            if record.by(one) == record.by(other):
                both = f"responses.{one} and {other}"
                dropped.append(Dropped("the two answers are the same text", path.name, index, both))
    return records, dropped


def _example(rng: Random, audience: str, number: int, block: list[_Record], signals: int) -> PersonalizationExample:
    pairs = [
        HeldOutPair(
            prompt=record.query, chosen=record.by(audience), rejected=record.by(rng.choice(record.others(audience)))
        )
        for record in block
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
