"""Judges, which compare responses, and readers of preferences; and the worlds in which the truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from popi import registry
from popi.data.example import PersonalizationExample

Tastes = Mapping[str, str]
"""The preferred side of each dimension that a user has a preference in."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt, to be compared on behalf of one user."""

    example: PersonalizationExample
    prompt: str
    first: str
    second: str


class Judge(Protocol):
    """Decides which of two responses a user would prefer."""

    async def compare(self, items: Sequence[Comparison]) -> list[float]:
        """Compares in order: 1 if the first response is better, 0 if the second is, 1/2 for a tie."""


class TasteReader(Protocol):
    """Reads the preferences of a summary, of a user, and of the signals."""

    def claimed(self, summary: str) -> Tastes:
        """The preferences that a summary claims, as far as they can be checked."""

    def true(self, example: PersonalizationExample) -> Tastes | None:
        """The preferences of the user, or ``None`` if they are unknown."""

    def evident(self, example: PersonalizationExample) -> Tastes | None:
        """The preferences that can be known from the signals, or ``None``."""


class World(Judge, TasteReader, Protocol):
    """A source of examples that knows the truth about its users.

    Attributes:
        remark: A remark that accompanies every figure from this world.
    """

    remark: str


WORLDS = {"miniworld": "popi.evaluation.miniworld:MiniWorld"}
"""The worlds by their names in ``facts["world"]`` of an example, as ``module:Class``."""


def world_of(examples: Sequence[PersonalizationExample]) -> World | None:
    """The world of all these examples, or ``None`` if they have no common one or it does not know all the users."""
    names = {str(example.facts.get("world")) for example in examples}
    name = names.pop() if len(names) == 1 else ""
    if name not in WORLDS:
        return None
    world: World = registry.load(WORLDS[name])()
    return None if any(world.true(example) is None for example in examples) else world
