"""The exact judge of the mini world: it parses the style of any answer and the claims of any summary."""

from __future__ import annotations

from collections.abc import Sequence

from popi.data.example import PersonalizationExample
from popi.data.miniworld import claimed_tastes, style_of, utility
from popi.evaluation.judges import Comparison, Tastes


class MiniWorld:
    """Knows the tastes of the users, so it neither errs nor favours what stands first."""

    remark = (
        "The mini world is a miniature, and these are the numbers of a miniature. That popi-mini-base, its untrained "
        "writer, is mediocre is a design choice of it: the distance to the evidence oracle is the room for training."
    )

    async def compare(self, items: Sequence[Comparison]) -> list[float]:
        """Prefers the answer of higher utility for the user's true tastes."""
        return [self._compare(item) for item in items]

    def _compare(self, item: Comparison) -> float:
        tastes = item.example.facts["tastes"]
        first, second = (utility(tastes, style_of(text)) for text in (item.first, item.second))
        return 0.5 if first == second else float(first > second)

    def claimed(self, summary: str) -> Tastes:
        """The sides that a summary names; one that it names both ways is left out."""
        return claimed_tastes(summary)

    def true(self, example: PersonalizationExample) -> Tastes | None:
        """The tastes that the user was made with."""
        return example.facts.get("tastes")

    def evident(self, example: PersonalizationExample) -> Tastes | None:
        """The claims that the exact posterior supports."""
        return example.facts.get("evidence_tastes")
