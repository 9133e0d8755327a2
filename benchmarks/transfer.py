"""The gain from summaries for generators that were not trained with their writer.

    python benchmarks/transfer.py --out runs/transfer

Rows are the interfaces that a generator reads. Columns are frozen generators, each with the backend that it would have
in practice: in this process, in a vLLM engine, on a vLLM server that returns log-probabilities over HTTP, and a black
box: a server that returns only text. Cells are preference accuracies where log-probabilities are available, else win
rates by the exact judge, with 95 % intervals by user, on users with unseen combinations of tastes. The cost of a cell
is the number of tokens that are read and written for a response. The mini world is a miniature.

``--generators`` names other generators: models, or YAML files that describe a backend.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, AsyncExitStack
from itertools import combinations
from pathlib import Path

from popi import registry
from popi.assembly import FILES, open_backend
from popi.backends.ledger import FREE, Price, Spent
from popi.cli.batches import identity
from popi.cli.evaluate import column, run_config
from popi.config import SingleConfig, load_backend
from popi.evaluation.folder import Folder
from popi.evaluation.report import markdown
from popi.evaluation.results import Cell, Results
from popi.evaluation.rows import choose
from popi.evaluation.run import evaluate
from popi.evaluation.samples import from_world
from popi.evaluation.statistics import Estimate
from popi.models import find
from popi.testing import VLLMServer, vllm_server

WRITER, UNTRAINED_WRITER = "popi-mini-writer", "popi-mini-base"
SPLIT = "unseen-combinations"
ROWS = "no-context", "raw-signals", "untrained-summary", "popi-summary", "another-users-summary", "evidence-oracle"
SERVED, BLACK_BOX = "popi-mini-reader-olmo", "popi-mini-reader-phi"
CONTEXT = 2048

COLUMNS = {
    "base": "{{backend: transformers, model: popi-mini-base}}",
    "reader": "{{backend: vllm, model: popi-mini-reader, options: {{context_length: {context}, cache_gib: 0.5}}}}",
    "olmo": (
        "{{backend: openai, model: {served}, options: {{base_url: 'http://127.0.0.1:{port}/v1', key: null, "
        "context_length: {context}, tokenizer: {served}}}}}"
    ),
    "phi": "{{backend: transformers, model: popi-mini-reader-phi}}",
    "black-box": (
        "{{backend: openai, model: {black_box}-as-text, options: {{base_url: 'http://127.0.0.1:{next_port}/v1', "
        "key: null, context_length: {context}}}}}"
    ),
}
"""Backend files. The black box is one of the columns again, without its log-probabilities."""


def main() -> None:
    """Measures what has not been measured yet, and prints the matrix and its summaries."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--users", type=int, default=400, help="users per sample")
    arguments.add_argument("--seeds", type=int, default=3, help="number of samples")
    arguments.add_argument("--judged", type=int, default=100, help="users per sample whose responses are judged")
    arguments.add_argument("--generators", nargs="+", help="instead of the five: models, or YAML files of backends")
    arguments.add_argument("--port", type=int, default=8765, help="port of the first of two servers")
    arguments.add_argument("--out", type=Path, required=True, help="folder for the measurements")
    given = arguments.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped too
    folder = Folder(given.out)
    if given.generators:
        columns = {identity(name): name for name in given.generators}
        results, spent = asyncio.run(measure(columns, given.users, given.seeds, given.judged, folder))
    else:
        with served(SERVED, SERVED, given.port), served(BLACK_BOX, f"{BLACK_BOX}-as-text", given.port + 1):
            columns = write_columns(given.out, given.port)
            results, spent = asyncio.run(measure(columns, given.users, given.seeds, given.judged, folder))
    folder.write("results.json", results.model_dump_json(indent=2) + "\n")
    folder.write("results.md", markdown(results, figure=False))
    print(f"{results.users} users, {given.seeds} samples; {results.notes[0]}\n")
    print_matrix(results)
    print_costs(results, {name: price_of(model) for name, model in columns.items()})
    print_gains(results)
    print_orders(results)
    for name, account in spent.items():
        if not account.requests:  # a model without a backend file has no ledger
            continue
        print(f"{name}: {account.requests:,} requests read {account.prompt_tokens:,} and wrote", end=" ")
        print(f"{account.completion_tokens:,} tokens, for {account.money:.4f}")


def served(model: str, name: str, port: int) -> AbstractContextManager[VLLMServer]:
    """Runs ``vllm serve`` within a ``with`` block."""
    options = ["--max-model-len", str(CONTEXT)]
    return vllm_server(find(model), name=name, port=port, options=options, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})


def write_columns(out: Path, port: int) -> dict[str, str]:
    """Writes a backend file for each column, and names the columns by their models, which all differ."""
    folder = out / "columns"
    folder.mkdir(parents=True, exist_ok=True)
    values = {"port": port, "next_port": port + 1, "served": SERVED, "black_box": BLACK_BOX, "context": CONTEXT}
    files = {}
    for name, text in COLUMNS.items():
        (file := folder / f"{name}.yaml").write_text(text.format(**values) + "\n", encoding="utf-8")
        files[load_backend(file).model] = str(file)
    return files


async def measure(
    generators: Mapping[str, str], users: int, seeds: int, judged: int, folder: Folder
) -> tuple[Results, dict[str, Spent]]:
    """The table, and what each generator cost in this run."""
    samples = from_world("miniworld", split=SPLIT, users=users, seeds=range(seeds))
    rows = choose(ROWS, trained=True)
    source = {"world": "miniworld", "split": SPLIT, "users_of_a_sample": users}
    made_from = {WRITER: UNTRAINED_WRITER}
    config = folder.open(run_config(source, samples, rows, [*generators.values()], WRITER, made_from, judged=judged))
    async with AsyncExitStack() as stack:
        opened = {name: open_backend(model, role="transfer") for name, model in generators.items()}
        writers = [open_backend(name)[0] for name in (WRITER, UNTRAINED_WRITER)]
        for backend in (*writers, *(backend for backend, _ in opened.values())):
            await stack.enter_async_context(backend)
        write = registry.inference("llm")
        total = users * seeds * len(ROWS) * len(generators)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            print(f"transfer: {done:,} of {total:,}", file=sys.stderr, flush=True)

        results = await evaluate(
            samples,
            rows=rows,
            columns=[column(backend, name=name) for name, (backend, _) in opened.items()],
            writer=write(writers[0]),
            untrained=write(writers[1]),
            folder=folder,
            judged=judged,
            settings={**config.settings, "seeds": config.seeds},
            advance=advance,
        )
        return results, {name: ledger.total for name, (_, ledger) in opened.items()}


def worth(cell: Cell) -> Estimate:
    """The accuracy of a cell, or its win rate if the backend does not score."""
    found = cell.accuracy or cell.win_rate
    assert found is not None, "the world has a judge"
    return found


def percent(estimate: Estimate, sign: str = "") -> str:
    """Formats an estimate in percent, with its interval."""
    value, low, high = (f"{100 * number:{sign}.1f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def print_matrix(results: Results) -> None:
    """Rows by columns, and the length of the interface by the tokenizer of the first column."""
    columns = {cell.column: cell.accuracy is not None for cell in results.cells}
    print(
        "|", " | ".join(["row", *(name if open_ else f"{name} (win rate)" for name, open_ in columns.items())]), end=""
    )
    print(" | tokens |\n|", "---|" * (len(columns) + 2), sep="")
    for row in ROWS:
        cells = [cell for cell in results.cells if cell.row == row]
        print("|", " | ".join([row, *(percent(worth(cell)) for cell in cells)]), f"| {cells[0].context_tokens:.0f} |")


def price_of(model: str) -> Price:
    """The price in a generator's backend file."""
    config = load_backend(Path(model)) if model.endswith(FILES) else None
    return Price(**config.price) if isinstance(config, SingleConfig) and config.price else FREE


def print_costs(results: Results, prices: Mapping[str, Price]) -> None:
    """The tokens read and written per judged response, and the cost of a thousand such responses."""
    print("\n| tokens of an answer, read + written |", " | ".join(prices), f"|\n|{'---|' * (len(prices) + 1)}")
    for row in ROWS:
        cells = {cell.column: cell for cell in results.cells if cell.row == row}
        print(f"| {row} |", " | ".join(cost_of(cells[name], price) for name, price in prices.items()), "|")


def cost_of(cell: Cell, price: Price) -> str:
    """Formats the cost of a cell."""
    if cell.prompt_tokens is None or cell.completion_tokens is None:
        return "not counted"
    tokens = f"{cell.prompt_tokens:.0f} + {cell.completion_tokens:.0f}"
    money = 1000 * price.of(cell.prompt_tokens, cell.completion_tokens)
    return f"{tokens}, {money:.3f}" if money else tokens


def print_gains(results: Results) -> None:
    """The gain from training for each generator, and the share of the evidence oracle's gain."""
    print()
    for name in dict.fromkeys(cell.column for cell in results.cells):
        cells = {cell.row: cell for cell in results.cells if cell.column == name}
        bare, after, best = (worth(cells[row]).value for row in ("no-context", "popi-summary", "evidence-oracle"))
        more = percent(cells["popi-summary"].differences["untrained-summary"], "+")
        share = f"{(after - bare) / (best - bare):.0%}" if best > bare else "none"
        print(f"{name}: trained minus untrained {more}; {share} of the oracle's gain")


def print_orders(results: Results) -> None:
    """Whether two columns rank the rows in the same order, where their intervals do not overlap."""
    print()
    names = list(dict.fromkeys(cell.column for cell in results.cells))
    for one, other in combinations(names, 2):
        both = against = 0
        for first, second in combinations(ROWS, 2):
            signs = [sign(results, name, first, second) for name in (one, other)]
            both += all(signs)
            against += all(signs) and signs[0] != signs[1]
        print(f"{one} and {other}: {against} of {both} pairs of rows that both distinguish are in another order")


def sign(results: Results, name: str, first: str, second: str) -> int:
    """Which of two rows is better for a generator: 1, -1, or 0 if their intervals overlap."""
    one, other = (
        worth(next(cell for cell in results.cells if (cell.row, cell.column) == (row, name))) for row in (first, second)
    )
    return (one.low > other.high) - (one.high < other.low)


if __name__ == "__main__":
    main()
