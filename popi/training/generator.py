"""Training of the generator on conditioned pairs, in a separate trainer or in the steps of the writer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from popi.errors import PopiError
from popi.training.adapters import exclude_other_adapters
from popi.training.checkpoints import CheckpointedTrainer
from popi.training.engines import through
from popi.training.objective import LOSSES, LogRatios, Loss, accuracy
from popi.training.ranks import ONE_RANK, Ranks
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
        ranks: The ranks of the run.
        adapter: The weights that are trained, by name, if they are not those of the model.
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
        ranks: Ranks = ONE_RANK,
        adapter: dict[str, nn.Parameter] | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._first, self._ranks, self.adapter = first, ranks, adapter
        if adapter is not None:
            exclude_other_adapters(model, adapter)
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
        inner = self.accelerator.unwrap_model(model)

        def compute() -> tuple[Tensor, Tensor]:
            ratios = self._scorer.ratios_for_gradient(items)
            return ratios.chosen_N, ratios.rejected_N

        ratios = LogRatios(*through(model, inner, compute))
        loss = self._objective(ratios.margins_N, self._beta).mean()
        metrics = self._ranks.mean(pair_metrics(ratios, self._beta, loss.item()))
        metrics["tokens/update"] = self._ranks.total(self._scorer.tokens_read - read)
        check_finite("the loss", metrics["generator/loss"], self._first + self.state.global_step)
        for name, value in metrics.items():
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
