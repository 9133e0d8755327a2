"""Checkpoints of a phase: whole or not taken, and everything that the next step depends on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from popi.io import write_text
from popi.run_folder import save_state, writing

log = logging.getLogger(__name__)

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
        write_text(folder / COMPLETE, json.dumps(_sizes(folder)) + "\n")


def last_complete(folder: Path) -> Path | None:
    """Finds the newest checkpoint of a phase whose files are all there in full.

    Incomplete checkpoints, which a killed run leaves, are removed. A damaged one, in which a file is missing or has
    another size than when it was written, is removed with a warning, so that the run resumes from the one before it.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            damaged = _damaged(path)
            if damaged is None:
                found[int(path.name.rpartition("-")[2])] = path
                continue
            log.warning("%s is damaged (%s); resuming from the checkpoint before it", path, damaged)
        shutil.rmtree(path)
    return found[max(found)] if found else None


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
