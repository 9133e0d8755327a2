"""The accuracy and the cost of different ways to train a writer and a generator together.

    python benchmarks/joining.py --out runs/joining

Each variant is ``recipes/popi_mini`` with a few values replaced and the same number of steps and users. The script
trains it, or resumes its training, and measures it like ``popi eval`` on users with unseen combinations of tastes, with
the context that its generator was trained with. The cost is summed over the steps: tokens that the writer sampled,
tokens that the generator scored, tokens in the gradient of the writer and of a generator that is trained separately,
and seconds.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from popi import registry
from popi.cli.evaluate import column, opened
from popi.config import JointRecipe, load, parse_overrides
from popi.evaluation.folder import Folder
from popi.evaluation.results import Results
from popi.evaluation.rows import choose
from popi.evaluation.run import evaluate
from popi.evaluation.samples import from_world
from popi.run_folder import METRICS, spent
from popi.training.joint import run
from popi.training.pair import GENERATOR, WRITER

RECIPE = Path(__file__).parents[1] / "recipes" / "popi_mini"
SPLIT = "unseen-combinations"


class Way(NamedTuple):
    """A variant: the values that it replaces in the recipe, and the row under which it is measured."""

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
    """Trains and measures the variants, and prints a line for each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    arguments.add_argument("--users", type=int, default=500, help="number of users for evaluation")
    arguments.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="values to replace in all variants"
    )
    arguments.add_argument("--out", type=Path, required=True, help="folder of the runs and their measurements")
    given = arguments.parse_args()
    overrides = parse_overrides(given.set)

    heads = "way", "accuracy, %", "evidence oracle, %", "sampled", "judged", "updated", "seconds"
    print(*heads, sep=" | ")
    print(*["---"] * len(heads), sep=" | ")
    for name in given.ways:
        recipe = load(RECIPE, WAYS[name].changes | overrides)
        assert isinstance(recipe, JointRecipe)
        folder = given.out / name
        run(recipe, folder, source=str(RECIPE), report=lambda _: None)
        results = asyncio.run(measure(recipe, folder, WAYS[name].row, given.users))
        print(name, *accuracies(results), *costs(folder / METRICS), sep=" | ", flush=True)


async def measure(recipe: JointRecipe, folder: Path, row: str, users: int) -> Results:
    """The accuracy of a run's models, and of the evidence oracle under the same generator."""
    before = {WRITER: recipe.writer.model, GENERATOR: recipe.generator.model}
    after = before | {role: str(folder / role) for role in recipe.results()}
    async with opened((*before.values(), *after.values())) as backends:
        write = registry.inference("llm")
        reference = backends[before[GENERATOR]] if after[GENERATOR] != before[GENERATOR] else None
        return await evaluate(
            from_world("miniworld", split=SPLIT, users=users, seeds=[recipe.seed]),
            rows=choose([row, "evidence-oracle"], trained=True),
            columns=[column(backends[after[GENERATOR]], reference)],
            writer=write(backends[after[WRITER]]),
            untrained=write(backends[before[WRITER]]) if after[WRITER] != before[WRITER] else None,
            folder=Folder(folder / f"measured-{users}"),
            judged=0,
            settings={},
        )


def accuracies(results: Results) -> Iterator[str]:
    """The accuracies in percent with their intervals, in the order of the rows."""
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
