"""What each way of joining a writer and a generator is worth, and what it costs.

    python benchmarks/joining.py --out runs/joining

Every way is ``recipes/popi_mini`` with a few values replaced: as many steps with as many users. A way is trained, or
goes on where it was stopped, and is then measured on users of unseen combinations of tastes as ``popi eval`` does it,
each generator under the context that it was trained with. What it costs is the sum over its steps: tokens that the
writer sampled, tokens that the generator read to judge, tokens with a gradient behind the writer's loss or behind that
of a generator which learns apart, and seconds.
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
from popi.training.models import GENERATOR, WRITER

RECIPE = Path(__file__).parents[1] / "recipes" / "popi_mini"
SPLIT = "unseen-combinations"


class Way(NamedTuple):
    """A way of joining: what it replaces in the recipe, and the row under which it is measured."""

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
    """Trains and measures the ways, and prints a line for each."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    arguments.add_argument("--users", type=int, default=500, help="who are measured")
    arguments.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="replaces values in all ways")
    arguments.add_argument("--out", type=Path, required=True, help="folder of the runs and of what was measured")
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
    """The accuracy of a run's models, beside that of the evidence oracle under the same generator."""
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
    """In percent with their intervals, in the order of the rows."""
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
