"""Joint steps of `popi train` at the shapes of real models: speed by part, memory against `popi plan`, utilisation.

    python benchmarks/speed/joint_steps.py --shape 3b --steps 20 --peak-tflops 989
    python benchmarks/speed/joint_steps.py --shape 15m --steps 2 --users 1 --samples 2 --summary 16 --length 200

The weights are random, so the texts have no meaning and replies are not summaries; the numbers of tokens are those that
are given. On a GPU memory is the peak that torch allocates, on a CPU that of the process. The utilisation of an update
is 6 operations for each weight and token, divided by its time and by ``--peak-tflops`` of the device.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, VOCABULARY, make_model

from popi.config import JointRecipe
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.engine.loading import load_tokenizer
from popi.io import write_jsonl
from popi.planning.lengths import Lengths
from popi.planning.memory import sizes_of
from popi.planning.plan import Machine, Planner, config_of
from popi.signals import Statement, UserSignals
from popi.training.joint import run

PARTS = ("rollout", "scoring", "update")


def words(count: int, seed: int) -> str:
    """A text of this many made-up words of the tokenizer."""
    draw = random.Random(seed)
    first = len(load_tokenizer("popi-mini-base"))
    return "".join(f" w{draw.randrange(first, VOCABULARY)}" for _ in range(count)).strip()


def make_users(count: int, length: int, answer: int) -> list[PersonalizationExample]:
    """Users whose signals have about this many tokens, with one pair each."""
    return [
        PersonalizationExample(
            user=UserSignals(user_id=f"user {n}", signals=(Statement(text=words(length, n)),)),
            tests=(
                HeldOutPair(
                    prompt=words(30, 10_000 + n),
                    chosen=words(answer, 20_000 + n),
                    rejected=words(answer, 30_000 + n),
                ),
            ),
        )
        for n in range(count)
    ]


def recipe_of(given: argparse.Namespace, model: str, data: Path) -> JointRecipe:
    """The recipe of the steps."""
    lora = {"rank": 16, "alpha": 32} if given.lora else None
    tree = {
        "task": "joint",
        "name": "steps",
        "data": {"file": str(data)},
        "writer": {"model": model, "num_generations": given.samples, "max_tokens": given.summary, "lora": lora},
        "generator": {"model": model, "lora": lora},
        "steps": given.steps,
        "users_per_step": given.users,
        "warmup": 1,
        "evaluate_every": given.steps,
        "evaluate_users": 1,
        "checkpoint_every": 10**6,
        "precision": given.precision,
        "gradient_checkpointing": given.gradient_checkpointing,
    }
    return JointRecipe.model_validate(tree)


def peak_memory() -> float:
    """The peak so far, in bytes."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def report(given: argparse.Namespace, recipe: JointRecipe, measured: Sequence[dict[str, Any]]) -> None:
    """Prints the figures. The first step is left out if there are others: it prepares what later ones use."""
    steps = measured[1:] or measured
    seconds = {part: sum(step[f"seconds/{part}"] for step in steps) for part in PARTS}
    tokens = {part: sum(step[f"tokens/{part}"] for step in steps) for part in PARTS}
    whole = sum(seconds.values())
    print(f"{given.shape}, {recipe.precision}, {'LoRA' if given.lora else 'full'}: {whole / len(steps):.2f} s a step")
    for part in PARTS:
        rate = tokens[part] / seconds[part] if seconds[part] else 0.0
        print(f"{part:8}  {seconds[part] / whole:4.0%}  {rate:10,.0f} tokens/s")
    weights, _ = sizes_of(config_of(recipe.writer.model), None)
    if given.peak_tflops:
        used = 6 * weights * tokens["update"] / seconds["update"] / 1e12
        print(f"utilisation of the update: {used / given.peak_tflops:.0%} of {given.peak_tflops:g} Tflop/s")
    on_gpu = torch.cuda.is_available()
    machine = Machine(1, float("inf"), gpu=on_gpu, process=0.0)
    lengths = Lengths(signals=given.length, prompt=60, answer=given.answer, summary=given.summary)
    planned = Planner(recipe, machine, lengths).plan().peak
    print(f"memory: {peak_memory() / 1e9:.2f} GB, planned {planned.peak.total() / 1e9:.2f} GB ({planned.moment})")


def main() -> None:
    """Runs the steps, and prints the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default="135m")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--users", type=int, default=8, help="users of a step")
    options.add_argument("--samples", type=int, default=8, help="summaries of a user")
    options.add_argument("--length", type=int, default=1500, help="tokens of the signals of a user, about")
    options.add_argument("--summary", type=int, default=64, help="tokens of a summary")
    options.add_argument("--answer", type=int, default=300, help="tokens of an answer, about")
    options.add_argument("--precision", default="auto", choices=("auto", "float32", "mixed", "bfloat16"))
    options.add_argument("--lora", action="store_true")
    options.add_argument("--gradient-checkpointing", action="store_true")
    options.add_argument("--peak-tflops", type=float, help="of the device, in its precision")
    given = options.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        model, data = Path(place) / "model", Path(place) / "users.jsonl"
        make_model(given.shape, model)
        write_jsonl(data, make_users(given.steps * given.users + 1, given.length, given.answer))
        recipe = recipe_of(given, str(model), data)
        run(recipe, Path(place) / "run", source="a benchmark", report=measured.append)
        report(given, recipe, measured)


if __name__ == "__main__":
    main()
