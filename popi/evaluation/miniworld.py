"""The exact judge of the mini world. It parses the style of any response and the claims of any summary."""

from __future__ import annotations

from collections.abc import Sequence

from popi.data.example import PersonalizationExample
from popi.data.miniworld import claimed_tastes, style_of, utility
from popi.evaluation.judges import Comparison, Tastes


class MiniWorld:
    """Knows the tastes of the users, so that its judgments have no errors, and no bias for the first response."""

    remark = (
        "The mini world is a miniature, and so are its numbers. Its untrained writer, popi-mini-base, is mediocre by "
        "design: the distance to the evidence oracle is the room for training."
    )

    async def compare(self, items: Sequence[Comparison]) -> list[float]:
        """Prefers the response with the higher utility for the user's true tastes."""
        return [self._compare(item) for item in items]

    def _compare(self, item: Comparison) -> float:
        tastes = item.example.facts["tastes"]
        first, second = (utility(tastes, style_of(text)) for text in (item.first, item.second))
        return 0.5 if first == second else float(first > second)

    def claimed(self, summary: str) -> Tastes:
        """The sides that a summary names. A dimension of which it names both sides is left out."""
        return claimed_tastes(summary)

    def true(self, example: PersonalizationExample) -> Tastes | None:
        """The tastes that the user was made with."""
        return _tastes(example, "tastes")

    def evident(self, example: PersonalizationExample) -> Tastes | None:
        """The claims that the exact posterior supports."""
        return _tastes(example, "evidence_tastes")


def _tastes(example: PersonalizationExample, fact: str) -> Tastes | None:
    # Facts of users' files may be anything.
    tastes = example.facts.get(fact)
    return tastes if isinstance(tastes, dict) else None
