import pytest

from popi.config import JointRecipe
from popi.training.schedule import phases_of


def recipe(**changes):
    tree = {
        "task": "joint",
        "name": "pair",
        "data": {"world": "miniworld", "users": 10},
        "writer": {"model": "a"},
        "generator": {"model": "b"},
        "steps": 7,
    }
    return JointRecipe.model_validate({**tree, **changes})


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({"schedule": "interleaved"}, [("1-both", "both", 0, 7)]),
        ({"schedule": "sequential"}, [("1-writer", "writer", 0, 7), ("2-generator", "generator", 7, 7)]),
        (
            {"schedule": "alternating", "rounds": 2},
            [
                ("1-writer", "writer", 0, 4),
                ("2-generator", "generator", 4, 4),
                ("3-writer", "writer", 8, 3),
                ("4-generator", "generator", 11, 3),
            ],
        ),
        ({"train": "writer"}, [("1-writer", "writer", 0, 7)]),
        ({"train": "generator", "schedule": "alternating"}, [("1-generator", "generator", 0, 7)]),
    ],
)
def test_the_phases_of_a_schedule(changes, phases):
    made = recipe(**changes)
    found = phases_of(made.train, interleaved=made.schedule == "interleaved", rounds=made.steps_of_rounds())
    assert [(phase.name, phase.kind, phase.first, phase.steps) for phase in found] == phases
