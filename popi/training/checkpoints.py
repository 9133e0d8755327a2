"""Checkpoints of a phase: complete or ignored, with everything that the next step depends on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from popi.io import write_text
from popi.run_folder import load_state, save_state, writing
from popi.training.adapters import copy_into
from popi.training.ranks import ONE_RANK, Ranks

log = logging.getLogger(__name__)

COMPLETE, ADAPTER = "complete", "adapter.pt"


class CheckpointedTrainer(Trainer):
    """A trainer that reports a failed write of a checkpoint as one error, and writes no model cards.

    Attributes:
        adapter: The weights that are trained, by name, if they are not those of the model. Checkpoints contain only
            them.
    """

    adapter: dict[str, nn.Parameter] | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing. A finished model gets a card of popi."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of transformers."""
        if self.adapter is not None and self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(list(self.adapter.values()), **options)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.adapter is None:
            super()._save(output_dir, state_dict)
        elif not self.is_deepspeed_enabled:
            # DeepSpeed writes all that it needs into files of its own.
            weights = {name: value.detach() for name, value in self.adapter.items()}
            save_state(Path(str(output_dir)) / ADAPTER, weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            fix = f"remove {resume_from_checkpoint} to resume from the checkpoint before it"
            copy_into(self.adapter, load_state(Path(resume_from_checkpoint) / ADAPTER, fix=fix))


class CheckpointCallback(TrainerCallback):
    """Adds state that the trainer does not know to each of its checkpoints, and then marks it as complete.

    Args:
        ranks: The ranks of the run.
        save: Writes the state into the folder of a checkpoint. Every rank calls it.
    """

    def __init__(self, ranks: Ranks = ONE_RANK, save: Callable[[Path], None] | None = None) -> None:
        self._ranks, self._save = ranks, save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer after it wrote its own files."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._save is not None:
            self._save(folder)
        self._ranks.barrier()
        self._ranks.on_first(lambda: write_text(folder / COMPLETE, json.dumps(_sizes(folder)) + "\n"))


def last_complete(folder: Path) -> Path | None:
    """Finds the newest complete checkpoint of a phase, and removes newer ones.

    A killed run leaves a checkpoint unfinished, and the run resumes from the one before it. So it does, with a warning,
    if a file of a finished checkpoint is missing or has another size than when it was written.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if (path / COMPLETE).exists():
            damaged = _damaged(path)
            if damaged is None:
                return path
            log.warning("%s is damaged (%s); resuming from the checkpoint before it, if any", path, damaged)
        shutil.rmtree(path)
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """The size of each file of a checkpoint, in bytes."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != COMPLETE)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _damaged(folder: Path) -> str | None:
    """Says which file of a checkpoint is missing or truncated, if any."""
    try:
        expected = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except ValueError:
        return f"{COMPLETE} is truncated"
    sizes = _sizes(folder)
    for name, size in expected.items():
        if sizes.get(name) != size:
            return f"{name} has {sizes[name]} bytes, not {size}" if name in sizes else f"{name} is missing"
    return None
