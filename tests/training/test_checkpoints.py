"""Which checkpoint a run resumes from, whatever happened to its files."""

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from popi.run_folder import save_state
from popi.training.checkpoints import CheckpointCallback, last_complete
from popi.training.updates import STATE

FILES = [
    "optimizer.pt",
    "model.safetensors",
    "trainer_state.json",
    "scheduler.pt",
    "rng_state.pth",
    "state.pt",
    "complete",
]


@pytest.fixture
def phase(tmp_path):
    """A phase with two complete checkpoints."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in FILES[:5]:
            (folder / name).write_bytes(b"0123456789")
        state = TrainerState(global_step=step)
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        CheckpointCallback(save=lambda to: save_state(to / STATE, {"weights": torch.zeros(3)})).on_save(
            args, state, TrainerControl()
        )
    return tmp_path


def test_the_newest_complete_checkpoint_is_taken(phase, caplog):
    assert last_complete(phase) == phase / "checkpoint-2"
    assert not caplog.text


@pytest.mark.parametrize("damage", ["empty", "truncated", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_in_one_line(phase, name, damage, caplog):
    file = phase / "checkpoint-2" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    assert last_complete(phase) == phase / "checkpoint-1"
    assert not (phase / "checkpoint-2").exists()
    # A checkpoint without its mark is one that a killed run was writing.
    assert len(caplog.records) == (not (name == "complete" and damage == "missing"))


def test_without_a_complete_checkpoint_the_phase_starts_at_its_beginning(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert last_complete(tmp_path) is None
    assert not list(tmp_path.iterdir())
