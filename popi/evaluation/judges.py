"""Who says which answer is better and what a summary claims: the seams, and the worlds whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from popi import registry
from popi.data.example import PersonalizationExample

Tastes = Mapping[str, str]
"""The side that is preferred in each dimension that is cared for."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt, to be compared in the eyes of one user."""

    example: PersonalizationExample
    prompt: str
    first: str
    second: str


class Judge(Protocol):
    """Says which of two answers a user would prefer."""

    async def compare(self, items: Sequence[Comparison]) -> list[float]:
        """Compares in order: 1 where the first answer is better, 0 where the second is, 1/2 for a tie."""


class TasteReader(Protocol):
    """Reads tastes: those that a summary claims, those that a user has, those that the signals show."""

    def claimed(self, summary: str) -> Tastes:
        """What a summary claims, as far as it can be checked."""

    def true(self, example: PersonalizationExample) -> Tastes | None:
        """What the user prefers, or ``None`` when it is not known."""

    def evident(self, example: PersonalizationExample) -> Tastes | None:
        """What can be known from the signals, or ``None``."""


class World(Judge, TasteReader, Protocol):
    """Where examples come from when the truth about their users is known.

    Attributes:
        remark: What has to be said beside every figure of this world.
    """

    remark: str


WORLDS = {"miniworld": "popi.evaluation.miniworld:MiniWorld"}
"""The world behind ``facts["world"]`` of an example, as ``module:Class``."""


def world_of(examples: Sequence[PersonalizationExample]) -> World | None:
    """The world that all of these examples come from, or ``None`` when there is no such one.

    A world whose truth about some user is lost is none.
    """
    names = {example.facts.get("world") for example in examples}
    name = names.pop() if len(names) == 1 else None
    if not isinstance(name, str) or name not in WORLDS:
        return None
    world: World = registry.load(WORLDS[name])()
    return None if any(world.true(example) is None for example in examples) else world
