"""Kills a training of two ranks at random moments, again and again, and compares its weights with an undisturbed one.

``PYTHONPATH=. python benchmarks/kill_and_resume.py --engine zero2 --kills 10`` prints a line for each kill and a table.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path

from popi.config import JointRecipe, load
from tests.training.rank_faults import Run, start
from tests.training.rank_runs import make_inputs, same_weights, write_recipe

SCHEDULES = ("interleaved", "sequential")
AT_THE_START = 0.2
"""The share of the kills that happen before the first step after a start."""


def recipe_of(folder: Path, engine: str, schedule: str, steps: int) -> Path:
    """Writes a recipe of the mini models with a checkpoint after every second step."""
    file = folder / f"{engine}-{schedule}.yaml"
    changes = {"engine.kind": engine, "schedule": schedule, "steps": steps, "checkpoint_every": 2, "evaluate_every": 4}
    resolved = load(write_recipe(file, make_inputs(folder)), changes)
    assert isinstance(resolved, JointRecipe)
    return write_recipe(file, resolved.model_dump(mode="json"))


def steps_done(out: Path) -> list[str]:
    """The phase of each step of a run."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["phase"] for line in lines if line.endswith("\n")]


def place_of(out: Path) -> str:
    """What a killed run was doing."""
    folders = [path for path in out.glob("phases/*/checkpoint-*") if not (path / "complete").exists()]
    if folders:
        return "in a checkpoint"
    return "between checkpoints" if list(out.glob("phases/*/checkpoint-*")) else "without a checkpoint"


def reached(out: Path, phases: list[str], target: str) -> bool:
    """Whether every phase before ``target`` is complete."""
    earlier = phases[: phases.index(target)]
    return not earlier or (out / "phases" / earlier[-1] / "weights.pt").exists()


def kill_in(run: Run, rng: random.Random, start_seconds: float, span: float) -> bool:
    """Kills a run while it starts, or within ``span`` seconds of its first step. False if it ended before."""
    before = steps_done(run.out)
    if rng.random() < AT_THE_START:
        until = time.monotonic() + rng.uniform(0, start_seconds)
    else:
        # The metrics of steps after the last checkpoint are dropped when training goes on.
        run.wait_until(lambda: steps_done(run.out) != before and len(steps_done(run.out)) > 0)
        until = time.monotonic() + rng.uniform(0, span)
    run.wait_until(lambda: time.monotonic() > until)
    alive = run.launcher.poll() is None
    run.kill_all()
    run.launcher.communicate()
    return alive


def disturbed(
    recipe: Path, out: Path, phases: dict[str, int], rng: random.Random, seconds: tuple[float, float]
) -> Counter[str]:
    """Runs a recipe with a number of kills in each phase. Counts them by what they interrupted."""
    left, places = dict(phases), Counter[str]()
    while any(left.values()):
        target = next(phase for phase, count in left.items() if count)
        run = start(recipe, out)
        run.wait_until(partial(reached, out, list(phases), target))
        if not kill_in(run, rng, *seconds):
            break
        steps = steps_done(out)
        phase = steps[-1] if steps else target
        left[phase] -= 1
        places[f"{phase}, {place_of(out)}"] += 1
        print(f"killed in {phase} after {len(steps)} steps, {place_of(out)}", flush=True)
    run = start(recipe, out)
    said, _ = run.ended(600)
    if run.launcher.returncode:
        raise SystemExit(said)
    return places


def main() -> None:
    """Measures one engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="zero2", choices=["ddp", "zero1", "zero2", "zero3"])
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--kills", type=int, default=10, help="in each phase")
    parser.add_argument("--steps", type=int, default=24, help="of each phase")
    parser.add_argument(
        "--span", type=float, default=4.0, help="a kill follows the first step of a start within this time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill_and_resume"))
    given = parser.parse_args()
    rng = random.Random(given.seed)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    for schedule in given.schedules:
        recipe = recipe_of(given.out.resolve(), given.engine, schedule, given.steps)
        whole, killed = (given.out.resolve() / f"{schedule}-{name}" for name in ("whole", "killed"))
        began = time.monotonic()
        run = start(recipe, whole)
        run.wait_until(lambda whole=whole: bool(steps_done(whole)))  # type: ignore[misc]
        starting = time.monotonic() - began
        said, _ = run.ended(600)
        if run.launcher.returncode:
            raise SystemExit(said)
        phases = dict.fromkeys(steps_done(whole), given.kills)
        places = disturbed(recipe, killed, phases, rng, (starting, given.span))
        equal = same_weights(whole, killed) and steps_done(whole) == steps_done(killed)
        for place, count in sorted(places.items()):
            print(f"| {given.engine} | {schedule} | {place} | {count} |")
        print(
            f"{given.engine}, {schedule}: {places.total()} kills, weights {'equal' if equal else 'DIFFER'}", flush=True
        )
        if not equal:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
