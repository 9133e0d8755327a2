"""Rollouts of a training in vLLM, compared with those of the engine after each update.

    python benchmarks/speed/rollouts.py --steps 20

``recipes/popi_mini`` is trained with the rollouts of the engine. Before each update vLLM, in a process of its own, gets
the current weights and samples from the same prompts with the same seeds. The script prints for each update how many
completions have the same tokens, and the mean and the largest difference of the log-probabilities of the tokens that
are equal, in nats. The time of vLLM includes the weights: written, sent and loaded.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from popi.config import JointRecipe, load, parse_overrides
from popi.engine.decoding import Completion
from popi.training import joint
from popi.training.rollouts import Rollouts
from popi.training.samplers import make_rollouts

RECIPE = Path(__file__).parents[2] / "recipes" / "popi_mini"


class Compared(NamedTuple):
    """The rollouts of an update.

    Attributes:
        completions: Number of completions.
        same: Number of completions with the same tokens.
        mean: Mean difference of a token's log-probability in nats, up to the first token that differs.
        largest: The largest difference.
        engine: Seconds of the engine.
        vllm: Seconds of vLLM.
    """

    completions: int
    same: int
    mean: float
    largest: float
    engine: float
    vllm: float


def compare(ours: Sequence[Completion], theirs: Sequence[Completion]) -> tuple[int, list[float]]:
    """Returns the number of equal completions, and the differences of the log-probabilities of equal tokens."""
    differences: list[float] = []
    for mine, other in zip(ours, theirs, strict=True):
        tokens = zip(mine.token_ids, other.token_ids, strict=False)
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], tokens))
        differences += (abs(a - b) for a, b in zip(mine.logprobs[:equal], other.logprobs[:equal], strict=True))
    return sum(a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True)), differences


class Both(Rollouts):
    """Samples with the engine, and compares its samples with those of vLLM."""

    def __init__(self, engine: Rollouts, vllm: Rollouts) -> None:
        self._engine, self._vllm = engine, vllm
        self.compared: list[Compared] = []

    def close(self) -> None:
        """Closes both."""
        self._engine.close()
        self._vllm.close()

    def sample(self, prompts: Sequence[list[int]], **options: Any) -> list[Completion]:
        """Returns the samples of the engine."""
        began = time.perf_counter()
        ours = self._engine.sample(prompts, **options)
        sampled = time.perf_counter()
        theirs = self._vllm.sample(prompts, **options)
        ended = time.perf_counter()
        same, differences = compare(ours, theirs)
        mean = sum(differences) / len(differences)
        self.compared.append(Compared(len(ours), same, mean, max(differences), sampled - began, ended - sampled))
        return ours


def show(compared: Sequence[Compared], steps: Sequence[dict[str, Any]]) -> None:
    """Prints the table, and the mean times without the first update."""
    print("update  same tokens     mean, nats  largest, nats  engine, s  vLLM, s")
    for update, each in enumerate(compared):
        same = f"{each.same}/{each.completions}"
        print(f"{update:6}  {same:>11}  {each.mean:13.1e}  {each.largest:13.1e}  {each.engine:9.2f}  {each.vllm:7.2f}")
    others = compared[1:] or compared
    engine, vllm = (sum(times) / len(others) for times in ([e.engine for e in others], [e.vllm for e in others]))
    rest = sum(step["seconds/scoring"] + step["seconds/update"] for step in steps[1:] or steps) / len(others)
    print(f"rollout, s: engine {engine:.2f}, vLLM {vllm:.2f}, ratio {engine / vllm:.2f}")
    print(f"step, s: engine {engine + rest:.2f}, vLLM {vllm + rest:.2f}, ratio {(engine + rest) / (vllm + rest):.2f}")


def main() -> None:
    """Trains, and prints the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--cache-gib", type=float, default=0.5, help="memory of vLLM for keys and values")
    options.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override values of the recipe")
    given = options.parse_args()
    recipe = load(RECIPE, {"steps": given.steps, "evaluate_every": given.steps, **parse_overrides(given.set)})
    assert isinstance(recipe, JointRecipe)
    served = recipe.model_copy(
        update={"writer": recipe.writer.model_copy(update={"rollouts": "vllm-colocate", "cache_gib": given.cache_gib})}
    )
    made: list[Both] = []

    def both(recipe: JointRecipe, *of_the_run: Any) -> Both:
        made.append(Both(make_rollouts(recipe, *of_the_run), make_rollouts(served, *of_the_run)))
        return made[-1]

    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, patch.object(joint, "make_rollouts", both):
        joint.run(recipe, Path(folder) / "run", source=str(RECIPE), report=steps.append)
    show([each for sampler in made for each in sampler.compared], steps)


if __name__ == "__main__":
    main()
