"""The phases of a joint run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["writer", "generator", "both"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a run in which one set of weights, or both, are updated.

    Attributes:
        name: Of its folder.
        kind: What is updated.
        first: Steps of the run before it.
        steps: Its own.
    """

    name: str
    kind: Kind
    first: int
    steps: int


def phases_of(train: Kind, *, interleaved: bool, rounds: Sequence[int]) -> list[Phase]:
    """The phases of a schedule, in order.

    Args:
        train: Which roles learn.
        interleaved: Whether both learn in the same steps, rather than the generator after the writer in each round.
        rounds: Steps of each round.
    """
    kinds: Sequence[Kind] = ("writer", "generator") if train == "both" and not interleaved else (train,)
    phases: list[Phase] = []
    first = 0
    for steps in rounds:
        for kind in kinds:
            phases.append(Phase(f"{len(phases) + 1}-{kind}", kind, first, steps))
            first += steps
    return phases
