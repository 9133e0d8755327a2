"""The metrics of a phase."""

import pytest
from transformers import TrainerControl, TrainerState

from popi.errors import PopiError
from popi.training.metrics import MetricsCallback
from popi.training.schedule import Phase

PHASE = Phase("2-generator", "generator", first=5, steps=3)


@pytest.fixture
def step_done():
    """Logs a step, and returns everything that was logged so far."""
    logged = []
    callback = MetricsCallback(
        PHASE,
        evaluate=lambda step: pytest.fail(f"an evaluation after {step} steps"),
        every=100,
        log=lambda metrics, found: logged.append(metrics),
        before={"tokens/rollout": 9.0},
    )

    def log(step, **logs):
        callback.on_log(None, TrainerState(global_step=step), TrainerControl(), logs=logs)
        return logged

    return log


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_logged(step_done):
    [first] = step_done(1, grad_norm=0.5)
    with pytest.raises(PopiError, match="the gradient norm became inf after 6 steps; lower the learning rate"):
        step_done(2, grad_norm=float("inf"))
    assert step_done(3, train_runtime=1.0) == [first]


def test_costs_before_the_first_step_are_logged_with_it_and_steps_are_those_of_the_run(step_done):
    step_done(1, grad_norm=0.5)
    shared = {"phase": "2-generator", "grad_norm": 0.5}
    assert step_done(2, grad_norm=0.5) == [{"step": 6, **shared, "tokens/rollout": 9.0}, {"step": 7, **shared}]
