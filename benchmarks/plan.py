"""The memory that `popi plan` estimates, against the peak of real runs on this machine.

    python benchmarks/plan.py

Each configuration trains for two steps in fresh processes, one for each rank, and the peak of each process is read from
the operating system (``ru_maxrss``). The model has random weights, 63 M parameters and a vocabulary of 49,152 tokens;
its tokenizer is that of a shipped model. ``base`` is the measured peak of the same run with a model of some thousand
parameters: Python, the libraries and their threads. The estimate adds to it.

glibc keeps freed blocks of up to 32 MB for later, so that the memory of a process would depend on the order of its
allocations. ``MALLOC_MMAP_THRESHOLD_`` makes it return every block of a megabyte: the peak is that of tensors in use.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
}
TINY = {**SHAPE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 1024}

RECIPE: dict[str, Any] = {
    "task": "joint",
    "name": "plan",
    "data": {"world": "miniworld", "users": 4, "pairs": 2},
    "writer": {"num_generations": 4, "max_tokens": 48},
    "generator": {},
    "steps": 2,
    "users_per_step": 2,
    "warmup": 1,
    "batch_tokens": 2048,
    "evaluate_users": 2,
    "precision": "float32",
}

LORA = {"rank": 16, "alpha": 32}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"writer.lora": LORA, "generator.lora": LORA},
    "ZeRO-2, two ranks": {"engine.kind": "zero2"},
    "ZeRO-3, two ranks": {"engine.kind": "zero3"},
    "shared": {"shared": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "mixed precision": {"precision": "mixed"},
}


def make_model(folder: Path, shape: dict[str, int]) -> str:
    """Writes a Llama with random weights and the tokenizer of a shipped model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from popi.engine.loading import load_tokenizer

    tokenizer = load_tokenizer("popi-mini-base")
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**{**shape, "vocab_size": max(shape["vocab_size"], len(tokenizer))}, **ends)
    config.tie_word_embeddings, config.max_position_embeddings = True, 8192
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_recipe(file: Path, model: str, changes: dict[str, Any]) -> Path:
    """Writes the recipe of a configuration."""
    tree = json.loads(json.dumps(RECIPE))
    for role in ("writer", "generator"):
        tree[role]["model"] = model
    for name, value in changes.items():
        *path, last = name.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    file.write_text(yaml.safe_dump(tree))
    return file


def ranks_of(changes: dict[str, Any]) -> int:
    """Number of processes of a configuration."""
    return 2 if str(changes.get("engine.kind", "")).startswith("zero") else 1


def measure(recipe: Path, folder: Path, ranks: int) -> float:
    """Trains in fresh processes. Returns the largest peak of a process in bytes."""
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(launcher if ranks > 1 else [sys.executable]), __file__, "--train", str(recipe), str(folder)]
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return max(float(file.read_text()) for file in folder.glob("peak-*"))


def train(recipe: Path, folder: Path) -> None:
    """Trains in this process, and writes its peak."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from popi.config import load
    from popi.training.joint import run

    run(load(recipe), folder, source="a benchmark", report=lambda metrics: None)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (folder / f"peak-{os.environ.get('RANK', '0')}").write_text(str(kilobytes * 1024))


def estimate(recipe: Path, ranks: int, base: float) -> Any:
    """The plan for processes on this machine."""
    from popi.config import JointRecipe, load
    from popi.planning.lengths import measure as measure_lengths
    from popi.planning.plan import Machine, Planner

    resolved = load(recipe)
    assert isinstance(resolved, JointRecipe)
    lengths = measure_lengths(resolved)
    assert lengths is not None, "the data and the tokenizer are here"
    return Planner(resolved, Machine(ranks, float("inf"), gpu=False, process=base), lengths.longest).plan()


def main() -> None:
    """Prints a table, one line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(*arguments.train)
        return
    print("configuration | base, GB | estimate, GB | measured, GB | difference, % | peak at")
    print("---|---|---|---|---|---", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make_model(folder / "model", {**SHAPE, "num_hidden_layers": arguments.layers})
        tiny = make_model(folder / "tiny", TINY)
        bases: dict[Any, float] = {}
        for number, name in enumerate(arguments.configurations):
            changes = CONFIGURATIONS[name]
            kind, ranks = changes.get("engine.kind"), ranks_of(changes)
            if kind not in bases:
                small = write_recipe(folder / "base.yaml", tiny, changes if kind else {})
                bases[kind] = measure(small, folder / f"base-{number}", ranks)
            recipe = write_recipe(folder / "recipe.yaml", model, changes)
            measured = measure(recipe, folder / f"run-{number}", ranks)
            peak = estimate(recipe, ranks, bases[kind]).peak
            expected = peak.peak.total()
            cells = [name, *(f"{size / 1e9:.2f}" for size in (bases[kind], expected, measured))]
            print(" | ".join([*cells, f"{100 * (expected / measured - 1):+.0f}", peak.moment]), flush=True)


if __name__ == "__main__":
    main()
