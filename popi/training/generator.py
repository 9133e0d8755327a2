"""Training of the generator on conditioned pairs, in a separate trainer or in the steps of the writer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from popi.errors import PopiError
from popi.training.checkpoints import CheckpointedTrainer
from popi.training.objective import LOSSES, LogRatios, Loss, accuracy
from popi.training.scoring import ConditionedPair, PairScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUMMED = ("tokens/", "seconds/")
"""Prefixes of the metrics that are summed over the batches of a step. All others are averaged."""


class GeneratorTrainer(CheckpointedTrainer):
    """Trains the generator on conditioned pairs that do not change.

    Args:
        model: The generator.
        args: Arguments of transformers.
        scorer: Scores with the same model.
        items: The conditioned pairs.
        loss: The objective.
        beta: Beta of the objective.
        first: Number of steps of the run before this trainer's.
        callbacks: Callbacks of transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        scorer: PairScorer,
        items: Sequence[ConditionedPair],
        loss: Loss,
        beta: float,
        first: int = 0,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._first = first
        self._scorer, self._objective, self._beta = scorer, LOSSES[loss], beta
        self._pending: dict[str, list[float]] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(items),
            data_collator=lambda batch: {"items": batch},
            callbacks=list(callbacks),
        )
        # The loss of a step is the mean over its batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of a batch of pairs."""
        items: list[ConditionedPair] = inputs["items"]
        read = self._scorer.tokens_read
        ratios = self._scorer.ratios_for_gradient(items)
        loss = self._objective(ratios.margins_N, self._beta).mean()
        check_finite("the loss", loss.item(), self._first + self.state.global_step)
        tokens = float(self._scorer.tokens_read - read)
        for name, value in {**pair_metrics(ratios, self._beta, loss.item()), "tokens/update": tokens}.items():
            self._pending.setdefault(name, []).append(value)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The step of transformers, timed."""
        began = time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)
        self._pending.setdefault("seconds/update", []).append(time.perf_counter() - began)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the pairs since the last call."""
        pending = {
            name: sum(values) / (1 if name.startswith(SUMMED) else len(values))
            for name, values in self._pending.items()
        }
        super().log({**logs, **pending}, start_time)
        self._pending.clear()


class GeneratorUpdate:
    """Updates the generator in the steps of the writer: AdamW with the learning rate schedule of a trainer.

    Args:
        model: The generator.
        learning_rate: Peak learning rate.
        steps: Number of updates.
        warmup: Number of updates until the learning rate reaches its peak.
        max_grad_norm: Maximum norm of the gradient.
    """

    def __init__(
        self, model: PreTrainedModel, *, learning_rate: float, steps: int, warmup: int, max_grad_norm: float
    ) -> None:
        self._model = model
        self._parameters = [value for value in model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, warmup, steps)
        self._max_grad_norm = max_grad_norm

    def __call__(self, step: int) -> float:
        """Applies the accumulated gradient, and returns its norm.

        Args:
            step: Number of steps of the run so far.

        Raises:
            PopiError: If the norm is not finite. The weights are not changed.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        check_finite("the gradient norm of the generator", norm, step)
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
        """Restores what :meth:`state` returned."""
        self._model.load_state_dict(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def pair_metrics(ratios: LogRatios, beta: float, loss: float) -> dict[str, float]:
    """The metrics of the pairs of a step, under the names and in the scale of TRL's ``DPOTrainer``.

    Args:
        ratios: Their log-probability ratios.
        beta: Beta of the objective. It scales the implicit rewards.
        loss: Their mean loss, in nats.
    """
    chosen, rejected = ratios.chosen_N.detach(), ratios.rejected_N.detach()
    return {
        "rewards/chosen": beta * chosen.mean().item(),
        "rewards/rejected": beta * rejected.mean().item(),
        "rewards/margins": beta * (chosen - rejected).mean().item(),
        "rewards/accuracies": accuracy(chosen - rejected),
        "generator/loss": loss,
    }


def check_finite(what: str, value: float, step: int) -> None:
    """Stops a run whose values are not finite.

    Args:
        what: The name of the value.
        value: The value.
        step: Number of steps of the run so far.

    Raises:
        PopiError: If the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise diverged(what, value, step)


def diverged(what: str, value: float, step: int) -> PopiError:
    """The error of a run in which ``what`` became ``value``."""
    return PopiError(f"{what} became {value} after {step} steps; lower the learning rate and start a new run")
