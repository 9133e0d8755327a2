"""What follows a trainer."""

import pytest
from transformers import TrainerControl, TrainerState

from popi.errors import PopiError
from popi.training.schedule import Phase
from popi.training.watch import Watch

PHASE = Phase("2-generator", "generator", first=5, steps=3)


@pytest.fixture
def follow():
    """Tells a watch of a step; what was logged so far."""
    logged = []
    watch = Watch(
        PHASE,
        look=lambda step: pytest.fail(f"a look after {step} steps"),
        every=100,
        log=lambda measured, seen: logged.append(measured),
        before={"tokens/rollout": 9.0},
    )

    def told(step, **logs):
        watch.on_log(None, TrainerState(global_step=step), TrainerControl(), logs=logs)
        return logged

    return told


def test_a_gradient_that_is_no_number_stops_the_run_before_it_is_logged(follow):
    [first] = follow(1, grad_norm=0.5)
    with pytest.raises(PopiError, match="the norm of the gradient became inf after 6 steps; lower the learning rate"):
        follow(2, grad_norm=float("inf"))
    assert follow(3, train_runtime=1.0) == [first]


def test_what_was_spent_before_the_first_step_is_told_with_it_and_the_step_is_that_of_the_run(follow):
    follow(1, grad_norm=0.5)
    shared = {"phase": "2-generator", "grad_norm": 0.5}
    assert follow(2, grad_norm=0.5) == [{"step": 6, **shared, "tokens/rollout": 9.0}, {"step": 7, **shared}]
