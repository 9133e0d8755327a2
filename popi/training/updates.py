"""Updates of the generator in the steps of the writer: with AdamW, with DeepSpeed, or as part of the writer's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from popi.run_folder import load_state, save_state
from popi.training.adapters import copy_into, trainable
from popi.training.engines import through
from popi.training.generator import check_finite
from popi.training.objective import LogRatios
from popi.training.ranks import ONE_RANK, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Compute = Callable[[], tuple[list[int], LogRatios]]
"""A pass of :meth:`popi.training.scoring.PairScorer.passes`."""

STATE, ENGINE = "state.pt", "generator"
"""The file and the folder of a checkpoint that contain the state of an update."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rates of an optimizer: a linear rise, and then a cosine down to zero, as those of a trainer.

    Attributes:
        learning_rate: Peak learning rate.
        steps: Number of updates.
        warmup: Number of updates until the learning rate reaches its peak.
    """

    learning_rate: float
    steps: int
    warmup: int

    def optimizer(self, weights: Iterable[nn.Parameter]) -> tuple[AdamW, LambdaLR]:
        """Makes an optimizer of these weights, and its schedule."""
        optimizer = AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
        return optimizer, get_cosine_schedule_with_warmup(optimizer, self.warmup, self.steps)


class GeneratorUpdate(ABC):
    """The update of the generator: the gradients of any number of passes, then one step."""

    def forward(self, compute: Compute) -> tuple[list[int], LogRatios]:
        """Computes a forward pass whose gradient is taken."""
        return compute()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of a loss.

        Args:
            loss: A part of the loss of this rank.
            last: Whether it is the last one of the step.
        """
        loss.backward()

    @abstractmethod
    def step(self, step: int) -> float | None:
        """Applies the gradient, which is the mean over the ranks.

        Args:
            step: Number of steps of the run so far.

        Returns:
            The norm of the gradient before clipping, or ``None`` if another update applies it.

        Raises:
            PopiError: If the norm is not finite.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes everything that the next update depends on into a checkpoint. Collective."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Reads what :meth:`save` wrote. Collective.

        Raises:
            InputError: If a file is not a checkpoint.
        """


class AdamWUpdate(GeneratorUpdate):
    """Updates with AdamW and the learning rate schedule of a trainer. Gradients are averaged over the ranks.

    Args:
        parameters: The weights of the generator that are trained, by name.
        schedule: The learning rates.
        max_grad_norm: Maximum norm of the gradient.
        ranks: The ranks of the run.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], schedule: Schedule, *, max_grad_norm: float, ranks: Ranks = ONE_RANK
    ) -> None:
        self._named, self._ranks, self._max_grad_norm = parameters, ranks, max_grad_norm
        self._parameters = list(parameters.values())
        self._optimizer, self._schedule = schedule.optimizer(self._parameters)

    def step(self, step: int) -> float:
        """See :meth:`GeneratorUpdate.step`. If it fails, the weights are not changed."""
        self._ranks.average([value.grad for value in self._parameters if value.grad is not None])
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        check_finite("the gradient norm of the generator", norm, step)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        """See :meth:`GeneratorUpdate.save`."""
        if self._ranks.is_first:
            weights = {name: value.detach() for name, value in self._named.items()}
            state = {"weights": weights, "optimizer": self._optimizer.state_dict()}
            save_state(folder / STATE, {**state, "schedule": self._schedule.state_dict()})

    def restore(self, folder: Path) -> None:
        """See :meth:`GeneratorUpdate.restore`."""
        state = _load(folder)
        copy_into(self._named, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


class ZeroUpdate(GeneratorUpdate):
    """Updates with an engine of DeepSpeed. The trainer of the writer has another one.

    Args:
        model: The generator. The engine distributes its weights, its gradients or its optimizer over the ranks.
        schedule: The learning rates.
        config: DeepSpeed's configuration.
        ranks: The ranks of the run.

    Attributes:
        engine: The engine.
    """

    def __init__(self, model: PreTrainedModel, schedule: Schedule, *, config: dict[str, Any], ranks: Ranks) -> None:
        import deepspeed

        self._model, self._ranks = model, ranks
        optimizer, self._schedule = schedule.optimizer(trainable(model).values())
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def forward(self, compute: Compute) -> tuple[list[int], LogRatios]:
        """See :meth:`GeneratorUpdate.forward`."""
        return _through(self.engine, self._model, compute)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See :meth:`GeneratorUpdate.backward`."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def step(self, step: int) -> float:
        """See :meth:`GeneratorUpdate.step`. The engine knows the norm only after the step."""
        self.engine.step()
        self._schedule.step()
        norm = float(self.engine.get_global_grad_norm())
        check_finite("the gradient norm of the generator", norm, step)
        return norm

    def save(self, folder: Path) -> None:
        """See :meth:`GeneratorUpdate.save`."""
        self.engine.save_checkpoint(str(folder / ENGINE), tag=ENGINE)
        if self._ranks.is_first:
            save_state(folder / STATE, {"schedule": self._schedule.state_dict()})

    def restore(self, folder: Path) -> None:
        """See :meth:`GeneratorUpdate.restore`."""
        self._schedule.load_state_dict(_load(folder)["schedule"])
        self.engine.load_checkpoint(str(folder / ENGINE), tag=ENGINE)


class SharedUpdate(GeneratorUpdate):
    """Leaves the gradient to the update of the writer, which has the same weights.

    Args:
        model: The model of both roles.
        wrapper: Returns its wrapper in the trainer of the writer, which exists later.
    """

    def __init__(self, model: PreTrainedModel, wrapper: Callable[[], nn.Module]) -> None:
        self._model, self._wrapper = model, wrapper

    def forward(self, compute: Compute) -> tuple[list[int], LogRatios]:
        """See :meth:`GeneratorUpdate.forward`."""
        # DDP averages what it finds in the update of the writer. It would average this gradient twice.
        return compute() if self._engine is None else _through(self._engine, self._model, compute)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See :meth:`GeneratorUpdate.backward`."""
        engine = self._engine
        if engine is None:
            super().backward(loss, last=last)
            return
        engine.set_gradient_accumulation_boundary(is_boundary=False)
        engine.backward(loss)

    def step(self, step: int) -> None:
        """Does nothing: the update of the writer follows."""

    def save(self, folder: Path) -> None:
        """Does nothing: the trainer of the writer saves the weights."""

    def restore(self, folder: Path) -> None:
        """Does nothing: the trainer of the writer restores the weights."""

    @property
    def _engine(self) -> Any:
        wrapper = self._wrapper()
        return wrapper if hasattr(wrapper, "set_gradient_accumulation_boundary") else None


def _through(wrapper: nn.Module, model: PreTrainedModel, compute: Compute) -> tuple[list[int], LogRatios]:
    def flat() -> tuple[list[int], Tensor, Tensor]:
        places, ratios = compute()
        return places, ratios.chosen_N, ratios.rejected_N

    places, chosen_N, rejected_N = through(wrapper, model, flat)
    return places, LogRatios(chosen_N, rejected_N)


def _load(folder: Path) -> dict[str, Any]:
    return load_state(folder / STATE, fix=f"remove {folder} to resume from the checkpoint before it")
