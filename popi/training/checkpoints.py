"""Checkpoints of a phase: whole or not taken, and everything that the next step depends on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from popi.io import write_text
from popi.run_folder import save_state, writing

BESIDE, COMPLETE = "beside.pt", "complete"


class Saves(Trainer):
    """A trainer whose checkpoints, where they have no room, end the run with one error, and which writes no cards."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: that of a finished model says more than a checkpoint's."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)


class Beside(TrainerCallback):
    """Adds to each checkpoint of a trainer what the trainer does not know, and marks it as complete in the end.

    Args:
        state: Gives what is to be kept.
    """

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self._state = state

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer when its own part is written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        save_state(folder / BESIDE, self._state())
        write_text(folder / COMPLETE, "")


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; what a killed run left of others is removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None
