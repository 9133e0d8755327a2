"""What the trainers of both roles are told alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def common_arguments(
    folder: Path, *, steps: int, warmup: int, seed: int, checkpoint_every: int, on_cpu: bool
) -> dict[str, Any]:
    """Arguments of transformers for a phase.

    Args:
        folder: Where its checkpoints stand.
        steps: Of the phase.
        warmup: Steps until the learning rate has risen; it falls as a cosine.
        seed: Of the run.
        checkpoint_every: Steps between two checkpoints.
        on_cpu: Whether to compute there.
    """
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup,
        "weight_decay": 0.0,
        "seed": seed,
        "logging_steps": 1,
        "save_steps": checkpoint_every,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": on_cpu,
        # The models are computed with by our own code, which knows its precision; accelerate's would cling to them.
        "bf16": False,
        "gradient_checkpointing": False,
    }
