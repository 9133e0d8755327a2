"""The generator's training: its loss on pairs under contexts, alone in a trainer or beside the writer's steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from popi.errors import PopiError
from popi.training.checkpoints import Saves
from popi.training.objective import LOSSES, Loss, accuracy
from popi.training.scoring import Judged, PairScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GeneratorTrainer(Saves):
    """Trains the generator on pairs under contexts that stay as they are.

    Args:
        model: The generator.
        args: Arguments of transformers.
        scorer: Scores with the same model.
        items: The pairs under their contexts.
        loss: The objective.
        beta: Its temperature.
        first: Steps of the run before its own.
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
        first: int = 0,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._first = first
        self._scorer, self._objective, self._beta = scorer, LOSSES[loss], beta
        self._seen: dict[str, list[float]] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(items),
            data_collator=lambda batch: {"items": batch},
            callbacks=list(callbacks),
        )
        # The loss is a mean: of several batches, the mean of them.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of a batch of pairs."""
        items: list[Judged] = inputs["items"]
        read = self._scorer.tokens
        margins = self._scorer.margins_for_gradient(items)
        loss = self._objective(margins, self._beta).mean()
        check_finite("the loss", loss.item(), self._first + self.state.global_step)
        figures = {**margin_figures(margins, loss.item()), "tokens/update": float(self._scorer.tokens - read)}
        for name, value in figures.items():
            self._seen.setdefault(name, []).append(value)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Transformers', timed."""
        began = time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)
        self._seen.setdefault("seconds/update", []).append(time.perf_counter() - began)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was seen of the pairs since the last line, and the sum of what they took."""
        seen = {
            name: sum(values) / (1 if name.startswith(("tokens/", "seconds/")) else len(values))
            for name, values in self._seen.items()
        }
        super().log({**logs, **seen}, start_time)
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
        self._model = model
        self._parameters = [value for value in model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, warmup, steps)
        self._clip = clip

    def __call__(self, step: int) -> float:
        """Follows the gradient that was collected, and returns its norm.

        Args:
            step: Steps of the run before it.

        Raises:
            PopiError: If the norm is no number; the weights are as they were.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip))
        check_finite("the norm of the generator's gradient", norm, step)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        return {
            "weights": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Undoes :meth:`state`."""
        self._model.load_state_dict(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def margin_figures(margins: Tensor, loss: float) -> dict[str, float]:
    """What is logged of the pairs of a step: their mean margin and loss, in nats, and the accuracy."""
    found = margins.detach()
    return {"margin": found.mean().item(), "accuracy": accuracy(found), "generator_loss": loss}


def check_finite(what: str, value: float, step: int) -> None:
    """Stops a run in which something is no number.

    Args:
        what: What was measured: a loss, the norm of a gradient, a margin.
        value: Its value.
        step: Steps of the run before it.

    Raises:
        PopiError: If it is none.
    """
    if not math.isfinite(value):
        raise diverged(what, value, step)


def diverged(what: str, value: float, step: int) -> PopiError:
    """The error of a run that cannot go on: ``what`` became ``value`` after so many steps."""
    return PopiError(f"{what} became {value} after {step} steps; lower the learning rate and start anew")
