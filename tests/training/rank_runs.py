"""Runs of training in several processes: the program that torchrun starts, and the functions of tests that start it."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.io import write_jsonl
from popi.models import find
from popi.signals import PreferencePair, Statement, UserSignals

DEADLINE = 240
"""Seconds until a rank that hangs prints where, and ends."""


MODEL = "popi-mini-base"


def make_inputs(folder: Path) -> dict[str, Any]:
    """Writes users with unequal signals and pairs, and returns a recipe of a few steps."""
    users = [
        PersonalizationExample(
            user=UserSignals(
                user_id=f"user {n}",
                signals=(
                    Statement(text=f"I like answer {n}. " * (1 + n % 3)),
                    *[PreferencePair(prompt=f"How {k}?", chosen=f"So {n}.", rejected="No.") for k in range(n % 4)],
                ),
            ),
            tests=tuple(
                HeldOutPair(prompt=f"What about {n}{k}?", chosen=f"This {n}. " * (1 + n % 2), rejected="That, I think.")
                for k in range(1 + n % 3)
            ),
        )
        for n in range(15)
    ]
    write_jsonl(folder / "users.jsonl", users)
    return {
        "task": "joint",
        "name": "tiny",
        "data": {"file": str(folder / "users.jsonl")},
        "writer": {
            "model": MODEL,
            "learning_rate": 0.001,
            "kl_coef": 0.01,
            "num_generations": 3,
            "max_tokens": 16,
            "temperature": 1.0,
        },
        "generator": {"model": MODEL, "learning_rate": 0.001, "beta": 0.1},
        "steps": 2,
        "users_per_step": 2,
        "pairs_per_summary": 2,
        "warmup": 1,
        "evaluate_every": 2,
        "evaluate_users": 3,
        "checkpoint_every": 1,
        "precision": "float32",
    }


def write_recipe(file: Path, tree: Mapping[str, Any]) -> Path:
    """Writes a recipe."""
    file.write_text(yaml.safe_dump(dict(tree)))
    return file


def command(ranks: int, *words: str) -> list[str]:
    """The command that starts a module in several processes of this machine."""
    return [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={ranks}", "-m", *words]


def environment() -> dict[str, str]:
    """The environment of the processes: one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def run_all(runs: Sequence[tuple[Path, Path]], ranks: int) -> subprocess.CompletedProcess[str]:
    """Runs recipes one after the other in the same processes.

    Args:
        runs: Recipes, all with the same kind of engine, and run folders.
        ranks: Number of processes.
    """
    words = ["tests.training.rank_runs", json.dumps([[str(recipe), str(out)] for recipe, out in runs])]
    return subprocess.run(
        command(ranks, *words), env=environment(), capture_output=True, text=True, timeout=2 * DEADLINE, check=False
    )


def distance(folder: Path, other: Path) -> float:
    """The largest distance of the weights of two runs, divided by the distance that the weights moved."""
    largest, initial = 0.0, _weights(Path(find(MODEL)))
    for role in ("writer", "generator"):
        found, wanted = _weights(other / role), _weights(folder / role)
        moved = torch.cat([(wanted[name] - initial[name]).flatten() for name in wanted]).norm()
        apart = torch.cat([(wanted[name] - found[name]).flatten() for name in wanted]).norm()
        largest = max(largest, float(apart / moved))
    return largest


def same_weights(folder: Path, other: Path) -> bool:
    """Whether the models of two runs are equal, bit for bit."""
    return all(
        torch.equal(value, _weights(other / role)[name])
        for role in ("writer", "generator")
        for name, value in _weights(folder / role).items()
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}


def _main() -> None:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    from popi.config import load
    from popi.training.joint import run

    # A picture takes longer than the steps of these runs.
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for recipe, out in json.loads(sys.argv[1]):
        run(load(Path(recipe)), Path(out), source="a test", report=lambda measured: None)


if __name__ == "__main__":
    _main()
