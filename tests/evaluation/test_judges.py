"""Who judges, and the exact judge of the mini world."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from popi.data.example import PersonalizationExample
from popi.evaluation.judges import Comparison, world_of
from popi.evaluation.miniworld import MiniWorld

Make = Callable[..., PersonalizationExample]


@pytest.mark.parametrize(
    ("tastes", "first", "second", "better"),
    [
        ({"format": "bullets"}, "- One thing.", "One thing.", 1.0),
        ({"format": "prose"}, "- One thing.", "One thing.", 0.0),
        ({"format": "bullets"}, "- One thing.", "- Another thing?", 0.5),
        ({"format": "bullets", "closing": "stop"}, "- One thing, is it?", "One thing.", 0.5),
        ({}, "- One thing.", "One thing.", 0.5),
    ],
)
async def test_the_mini_world_prefers_what_meets_more_tastes(
    tastes: dict[str, str], first: str, second: str, better: float, make_example: Make
) -> None:
    example = make_example("ann", ("good", "bad"), tastes=tastes)
    forward, backward = Comparison(example, "Why?", first, second), Comparison(example, "Why?", second, first)
    assert await MiniWorld().compare([forward, backward]) == [better, 1 - better]


def test_a_world_is_known_by_its_examples(make_example: Make) -> None:
    known, unknown = make_example("ann", ("a", "b"), tastes={"format": "prose"}), make_example("bob", ("a", "b"))
    elsewhere = known.model_copy(update={"facts": {"world": "moon"}})
    assert isinstance(world_of([known, known]), MiniWorld)
    lost = known.model_copy(update={"facts": {"world": "miniworld"}})
    assert world_of([known, lost]) is None
    odd = known.model_copy(update={"facts": {"world": ["miniworld"], "tastes": {}}})
    untold = known.model_copy(update={"facts": {"world": "miniworld", "tastes": "prose"}})
    for examples in ([odd], [untold], [known, unknown], [unknown], [elsewhere], [known, elsewhere], []):
        assert world_of(examples) is None
