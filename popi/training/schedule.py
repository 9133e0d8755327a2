"""The phases of a joint run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from popi.config import JointRecipe

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


def phases_of(recipe: JointRecipe) -> list[Phase]:
    """The phases of a recipe's schedule, in order."""
    kinds: list[Kind]
    if recipe.train != "both":
        kinds, steps = [recipe.train], [recipe.steps]
    elif recipe.schedule == "interleaved":
        kinds, steps = ["both"], [recipe.steps]
    else:
        rounds = recipe.rounds if recipe.schedule == "alternating" else 1
        shares = [recipe.steps // rounds + (place < recipe.steps % rounds) for place in range(rounds)]
        kinds, steps = ["writer", "generator"] * rounds, [share for share in shares for _ in range(2)]
    first = np.cumsum([0, *steps]).tolist()
    return [
        Phase(f"{place}-{kind}", kind, start, count)
        for place, (kind, start, count) in enumerate(zip(kinds, first, steps, strict=False), start=1)
    ]
