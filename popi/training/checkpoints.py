"""Checkpoints of a phase: whole or not taken, and everything that the next step depends on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from popi.errors import PopiError
from popi.io import replacing, write_text

BESIDE, COMPLETE = "beside.pt", "complete"


class Beside(TrainerCallback):
    """Adds to each checkpoint of a trainer what the trainer does not know, and marks it as complete in the end.

    Args:
        state: Gives what is to be kept, or nothing.
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


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and numbers, whole or not at all.

    Raises:
        PopiError: If they cannot be written.
    """
    try:
        with replacing(path, binary=True) as stream:
            torch.save(state, stream)
    # Torch tells of a full disk in its own way.
    except RuntimeError as error:
        raise PopiError(f"cannot write {path}: {error}; the last checkpoint is intact") from error


def load_state(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote."""
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state
