"""Reports the metrics of a trainer, and evaluates on held-out users."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from popi.training.generator import check_finite
from popi.training.held_out import HeldOutEval
from popi.training.schedule import Phase


class MetricsCallback(TrainerCallback):
    """Reports the metrics of each step of a phase, and evaluates on held-out users.

    Args:
        phase: The phase.
        evaluate: Evaluates on held-out users, given the step of the run.
        every: Number of steps between evaluations. The last step of the phase is evaluated, too.
        log: Takes the metrics of a step, and its evaluation if there was one.
        before: Costs before the first step. They are reported with it.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        evaluate: Callable[[int], HeldOutEval],
        every: int,
        log: Callable[[dict[str, Any], HeldOutEval | None], None],
        before: Mapping[str, float],
    ) -> None:
        self._phase, self._evaluate, self._every, self._log = phase, evaluate, every, log
        self._before = before

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Called by the trainer after each step, before its checkpoint is written, and once at the end.

        Raises:
            PopiError: If the norm of the gradient or a result of the evaluation is not finite.
        """
        logs: dict[str, Any] = given["logs"]
        if "train_runtime" in logs:
            return
        step = self._phase.first + state.global_step
        check_finite("the gradient norm", logs["grad_norm"], step - 1)
        metrics: dict[str, Any] = {"step": step, "phase": self._phase.name, **logs}
        if state.global_step == 1:
            metrics |= self._before
        found = None
        if step % self._every == 0 or state.global_step == self._phase.steps:
            found = self._evaluate(step)
            metrics["held_out"] = found.metrics()
        self._log(metrics, found)
