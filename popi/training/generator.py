"""The generator's training: its loss on pairs under contexts, alone in a trainer or beside the writer's steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from popi.errors import PopiError
from popi.training.objective import LOSSES, Loss
from popi.training.scoring import Judged, PairScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GeneratorTrainer(Trainer):
    """Trains the generator on pairs under contexts that stay as they are.

    Args:
        model: The generator.
        args: Arguments of transformers.
        scorer: Scores with the same model.
        items: The pairs under their contexts.
        loss: The objective.
        beta: Its temperature.
        callbacks: Of transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        scorer: PairScorer,
        items: Sequence[Judged],
        loss: Loss,
        beta: float,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._scorer, self._objective, self._beta = scorer, LOSSES[loss], beta
        self._seen: dict[str, list[float]] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(items),
            data_collator=lambda batch: {"items": batch},
            callbacks=list(callbacks),
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of a batch of pairs."""
        items: list[Judged] = inputs["items"]
        margins = torch.cat([found for _, found in self._scorer.passes(items)])
        loss = self._objective(margins, self._beta).mean()
        check_finite(loss.item(), self.state.global_step)
        note_margins(self._seen, margins)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the margins and the accuracy of the batches since the last line."""
        super().log({**logs, **{name: sum(values) / len(values) for name, values in self._seen.items()}}, start_time)
        self._seen.clear()


class GeneratorUpdate:
    """Updates the generator beside the writer's steps, by AdamW with the same schedule as a trainer's.

    Args:
        model: The generator.
        learning_rate: At its peak.
        steps: How many updates there will be.
        warmup: Updates until the learning rate has risen.
        clip: The largest norm of the gradient.
    """

    def __init__(self, model: PreTrainedModel, *, learning_rate: float, steps: int, warmup: int, clip: float) -> None:
        self._parameters = [value for value in model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, warmup, steps)
        self._clip = clip

    def __call__(self) -> float:
        """Follows the gradient that was collected, and returns its norm."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip))
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Any]:
        """What the next update depends on beside the weights."""
        return {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Undoes :meth:`state`."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def note_margins(seen: dict[str, list[float]], margins: Tensor) -> None:
    """Adds what margins are like to what is logged."""
    found = margins.detach()
    seen.setdefault("margin", []).append(found.mean().item())
    seen.setdefault("accuracy", []).append(((found > 0).float() + (found == 0).float() / 2).mean().item())


def check_finite(loss: float, step: int) -> None:
    """Stops a run whose loss is no number.

    Raises:
        PopiError: If it is not.
    """
    if not math.isfinite(loss):
        raise PopiError(f"the loss of step {step + 1} is {loss}; lower the learning rate and start anew")
