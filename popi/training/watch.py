"""Follows a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from popi.training.generator import check_finite
from popi.training.look import Look
from popi.training.schedule import Phase


class Watch(TrainerCallback):
    """Follows a trainer: writes what it measures, and looks at held-out users.

    Args:
        phase: The phase.
        look: Looks at held-out users after so many steps of the run.
        every: Steps between two looks; the end of the phase is one too.
        log: Takes what was measured in a step, and what a look has seen.
        before: What was spent before the first step, which is told with it.
    """

    def __init__(
        self,
        phase: Phase,
        *,
        look: Callable[[int], Look],
        every: int,
        log: Callable[[dict[str, Any], Look | None], None],
        before: Mapping[str, float],
    ) -> None:
        self._phase, self._look, self._every, self._log = phase, look, every, log
        self._before = before

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Called by the trainer after each step, before it is kept in a checkpoint, and once at the end.

        Raises:
            PopiError: If the norm of the gradient, or what a look finds, is no number.
        """
        logs: dict[str, Any] = given["logs"]
        if "train_runtime" in logs:
            return
        step = self._phase.first + state.global_step
        check_finite("the norm of the gradient", logs["grad_norm"], step - 1)
        measured: dict[str, Any] = {"step": step, "phase": self._phase.name, **logs}
        if state.global_step == 1:
            measured |= self._before
        found = None
        if step % self._every == 0 or state.global_step == self._phase.steps:
            found = self._look(step)
            measured["held_out"] = found.figures()
        self._log(measured, found)
