"""The phases of a joint run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["writer", "generator", "both"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run in which one role, or both, are updated.

    Attributes:
        name: Name of its folder.
        kind: The roles that are updated.
        first: Number of steps of the run before it.
        steps: Number of its steps.
    """

    name: str
    kind: Kind
    first: int
    steps: int


def phases_of(train: Kind, *, interleaved: bool, rounds: Sequence[int]) -> list[Phase]:
    """The phases of a schedule, in order.

    Args:
        train: The roles that are trained.
        interleaved: Whether both are trained in the same steps, and not the generator after the writer in each round.
        rounds: Number of steps of each round.
    """
    kinds: Sequence[Kind] = ("writer", "generator") if train == "both" and not interleaved else (train,)
    phases: list[Phase] = []
    first = 0
    for steps in rounds:
        for kind in kinds:
            phases.append(Phase(f"{len(phases) + 1}-{kind}", kind, first, steps))
            first += steps
    return phases
