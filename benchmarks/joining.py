"""Results and costs of the ways to join a writer and a generator.

    python benchmarks/joining.py --out runs/joining
    python benchmarks/joining.py --recipe recipes/smollm2_dsp --data runs/dsp/eval.jsonl --out runs/dsp-joining

Each way is a recipe with some values replaced, and has the same number of steps and users. An interrupted run is
resumed. The models are evaluated as by ``popi eval``, on the users of a file, or on users of the mini world with unseen
combinations of tastes, and each generator under the context that it was trained with. The oracle is the best summary
that the signals allow, or the true preferences if the data have only these. The cost is the sum over the steps: tokens
that the writer sampled, tokens that the generator read in scoring, tokens that were read with a gradient, and seconds.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from popi import registry
from popi.cli.evaluate import column, opened
from popi.config import JointRecipe, load, parse_overrides
from popi.evaluation.folder import Folder
from popi.evaluation.results import Results
from popi.evaluation.rows import choose
from popi.evaluation.run import evaluate
from popi.evaluation.samples import Sample, from_file, from_world
from popi.run_folder import METRICS, spent
from popi.training.joint import run
from popi.training.models import GENERATOR, WRITER

RECIPE = Path(__file__).parents[1] / "recipes" / "popi_mini"
SPLIT, USERS = "unseen-combinations", 500


class Way(NamedTuple):
    """A way to join: the values that it replaces in the recipe, and the row of its evaluation."""

    changes: dict[str, Any]
    row: str = "popi-summary"


WAYS = {
    "interleaved": Way({}),
    "sequential": Way({"schedule": "sequential"}),
    "alternating": Way({"schedule": "alternating"}),
    "shared-weights": Way({"shared": True}),
    "ipo": Way({"generator.loss": "ipo"}),
    "ipo-0.05": Way({"generator.loss": "ipo", "generator.beta": 0.05}),
    "std-in-advantage": Way({"writer.scale_by_std": True}),
    "writer-alone": Way({"train": "writer"}),
    "generator-alone": Way({"train": "generator"}, "untrained-summary"),
    "generator-without-context": Way({"train": "generator", "generator.context": "none"}, "no-context"),
    "generator-on-raw-signals": Way({"train": "generator", "generator.context": "raw-signals"}, "raw-signals"),
}


def main() -> None:
    """Trains and evaluates the ways, and prints a line for each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--recipe", type=Path, default=RECIPE, help="recipe of the joint training")
    arguments.add_argument("--data", type=Path, help="users for evaluation; without it, they are of the mini world")
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    arguments.add_argument(
        "--users", type=int, help=f"number of users in the evaluation [default: all of a file, {USERS} of the world]"
    )
    arguments.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override values in all ways")
    arguments.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    given = arguments.parse_args()
    overrides = parse_overrides(given.set)

    heads = "way", "accuracy, %", "oracle, %", "sampled", "judged", "updated", "seconds"
    print(*heads, sep=" | ")
    print(*["---"] * len(heads), sep=" | ")
    for name in given.ways:
        recipe = load(given.recipe, WAYS[name].changes | overrides)
        assert isinstance(recipe, JointRecipe)
        folder = given.out / name
        run(recipe, folder, source=str(given.recipe), report=lambda _: None)
        results = asyncio.run(measure(recipe, folder, WAYS[name].row, sample_of(given.data, given.users, recipe.seed)))
        print(name, *accuracies(results), *costs(folder / METRICS), sep=" | ", flush=True)


def sample_of(data: Path | None, users: int | None, seed: int) -> Sample:
    """The users for evaluation."""
    if data is None:
        [sample] = from_world("miniworld", split=SPLIT, users=users or USERS, seeds=[seed])
    else:
        [sample] = from_file(data, users=users, seeds=[seed])
    return sample


async def measure(recipe: JointRecipe, folder: Path, row: str, sample: Sample) -> Results:
    """The accuracy of the models of a run, and of the oracle with the same generator."""
    before = {WRITER: recipe.writer.model, GENERATOR: recipe.generator.model}
    after = before | {role: str(folder / role) for role in recipe.results()}
    async with opened((*before.values(), *after.values())) as backends:
        write = partial(registry.inference("llm"), prompts=recipe.writer.options.get("prompts"))
        prompts = recipe.generator.options.get("prompts")
        oracle = "evidence-oracle" if "evidence" in sample.examples[0].oracles else "true-taste-oracle"
        reference = backends[before[GENERATOR]] if after[GENERATOR] != before[GENERATOR] else None
        return await evaluate(
            [sample],
            rows=choose([row, oracle], trained=True),
            columns=[column(backends[after[GENERATOR]], reference, prompts=prompts)],
            writer=write(backends[after[WRITER]]),
            untrained=write(backends[before[WRITER]]) if after[WRITER] != before[WRITER] else None,
            folder=Folder(folder / f"measured-{len(sample.examples)}"),
            judged=0,
            settings={},
        )


def accuracies(results: Results) -> Iterator[str]:
    """Accuracies in percent with their intervals, in the order of the rows."""
    for cell in results.cells:
        value, low, high = (100 * end for end in (cell.accuracy.value, cell.accuracy.low, cell.accuracy.high))
        yield f"{value:.1f} [{low:.1f}, {high:.1f}]"


def costs(metrics: Path) -> Iterator[str]:
    """Tokens in thousands, and seconds, summed over the steps of a run."""
    took = spent(metrics)
    for name in ("rollout", "scoring", "update"):
        yield f"{took.get(f'tokens/{name}', 0.0) / 1000:.0f} k"
    yield f"{sum(value for name, value in took.items() if name.startswith('seconds/')):.0f}"


if __name__ == "__main__":
    main()
