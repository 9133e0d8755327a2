"""``popi eval``: what summaries are worth, with controls and intervals."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popi.cli.output import JsonFlag, note, print_json, print_table, progress, wants_json
from popi.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from pydantic import BaseModel

    from popi.backends.base import Backend
    from popi.evaluation.folder import Folder, RunConfig
    from popi.evaluation.measure import Column
    from popi.evaluation.results import Results
    from popi.evaluation.rows import Row
    from popi.evaluation.samples import Sample

JUDGED = 200
"""Users of each sample whose answers are judged: writing an answer costs far more than scoring one."""

WORLD_USERS = 1000

GENERATORS = ("popi-mini-base", "popi-mini-generator", "popi-mini-reader")


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for the figures and for what they rest on, user by user.")],
    data: Annotated[Path | None, typer.Option(help="JSON lines: examples with test pairs.")] = None,
    world: Annotated[str | None, typer.Option(help="Make the users instead: miniworld.")] = None,
    split: Annotated[str | None, typer.Option(help="Of the world [default: unseen-combinations].")] = None,
    users: Annotated[
        int | None, typer.Option(min=1, help="Of each sample [default: 1000 of a world, all of a file].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first sample.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Samples of users, each with a seed of its own.")] = 1,
    writer: Annotated[
        str, typer.Option(help="Name, path, hub id or YAML file: writes the summaries.")
    ] = "popi-mini-writer",
    generator: Annotated[
        list[str] | None,
        typer.Option(help=f"Likewise: a column; may be repeated [default: {', '.join(GENERATORS)}]."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Names of rows, with commas between [default: all].")] = "",
    json: JsonFlag = False,
) -> None:
    """Measure what a generator gains by the summaries of a writer.

    A model that popi trained is compared with what it was made from: a writer's summaries with those of the untrained
    one, a generator's likelihoods with those of its reference.

    OUT receives results.json, results.md, accuracy_vs_context.png and config.json. The same command goes on where it
    was interrupted; more rows, generators and seeds may be added to a folder, other settings are refused.
    """
    import asyncio

    from popi.registry import load

    load("numpy")  # the base installation has none, and the error has to name the extra
    from popi.cli.batches import identity, telling
    from popi.evaluation import rows as table
    from popi.evaluation.folder import Folder
    from popi.trained import training_record

    columns = list(dict.fromkeys(map(identity, generator or GENERATORS)))
    writer = identity(writer)
    records = {name: training_record(name) for name in (writer, *columns)}
    made_from = {name: made for name, record in records.items() if record and (made := record.made_from) is not None}
    chosen = table.choose([name.strip() for name in rows.split(",") if name.strip()], trained=writer in made_from)
    samples, source = _samples(data, world, split, users, list(range(seed, seed + seeds)))
    folder = Folder(out)
    config = folder.open(run_config(source, samples, chosen, columns, writer, made_from))
    start = time.monotonic()
    with telling(f"what is measured is kept in {out}, and the same command goes on"):
        try:
            results = asyncio.run(_measure(samples, chosen, columns, writer, made_from, folder, config))
        finally:
            folder.close(config, time.monotonic() - start)
        _write(results, folder)
    show(results, as_json=wants_json(json))
    note(f"written to {out}")


def show(results: Results, *, as_json: bool) -> None:
    """Prints the tables with what has to be said beside them; as JSON lines, each figure is one."""
    from popi.evaluation.report import remarks, tables

    if as_json:
        kinds: dict[str, Sequence[BaseModel]] = {
            "cell": results.cells,
            "control": results.controls,
            "faithfulness": results.summaries,
        }
        for kind, figures in kinds.items():
            for figure in figures:
                print_json({"kind": kind, **figure.model_dump()})
        print_json({"kind": "remarks", "remarks": remarks(results)})
        return
    for table in tables(results, narrow=True):
        print_table(table.records, title=table.title)
    from rich.console import Console

    for remark in remarks(results):
        Console(highlight=False, markup=False).print(remark)


@asynccontextmanager
async def opened(models: Iterable[str]) -> AsyncIterator[dict[str, Backend]]:
    """Loads models, each once; in the end closes them, and tells what was spent on those that have accounts."""
    from popi.cli.batches import accounted, load_backend

    async with AsyncExitStack() as stack:
        found = {}
        for name in dict.fromkeys(models):
            backend, ledger = load_backend(name, "evaluation")
            stack.enter_context(accounted(ledger, name))
            found[name] = await stack.enter_async_context(backend)
        yield found


def column(backend: Backend, reference: Backend | None = None, *, name: str = "") -> Column:
    """A model as a generator under test, and what it was before it was trained; its name is the model's, or given."""
    from popi.evaluation.measure import Column
    from popi.registry import generator

    make = generator("prompted")
    return Column(name or backend.model, make(backend), backend, None if reference is None else make(reference))


def _samples(
    data: Path | None, world: str | None, split: str | None, users: int | None, seeds: Sequence[int]
) -> tuple[list[Sample], dict[str, object]]:
    """The users, and where they come from, as settings."""
    from popi.evaluation import samples
    from popi.provenance import fingerprint_files

    if (data is None) == (world is None):
        raise ConfigError("the users come from --data FILE or from --world miniworld", fix="give one of the two")
    if data is not None:
        if split is not None:
            raise ConfigError("a file has no splits", field="split", fix="leave --split out")
        made = samples.from_file(data, users=users, seeds=seeds)
        source = {"data": str(data.resolve()), "data_files": fingerprint_files(data), "dealt_by_seed": seeds[0]}
    else:
        assert world is not None
        split = split or "unseen-combinations"
        made = samples.from_world(world, split=split, users=users or WORLD_USERS, seeds=seeds)
        source = {"world": world, "split": split}
    return made, {**source, "users_of_a_sample": len(made[0].examples)}


def run_config(
    source: dict[str, object],
    samples: Sequence[Sample],
    rows: Sequence[Row],
    columns: Sequence[str],
    writer: str,
    made_from: Mapping[str, str],
    *,
    judged: int = JUDGED,
) -> RunConfig:
    """What the figures of a folder rest on."""
    from popi.evaluation.folder import RunConfig
    from popi.prompts import DEFAULT
    from popi.provenance import versions
    from popi.registry import load

    found = versions()
    return RunConfig(
        settings={
            **source,
            "writer": writer,
            "judged": judged,
            # Margins subtract scores, which have to be of one precision.
            "dtype": load("popi.engine.loading:default_dtype")(),
            "template_hash": DEFAULT.hash,
            "popi": found["popi"],
        },
        models={name: _fingerprint(name) for name in (writer, *columns, *made_from.values())},
        rows=[row.name for row in rows],
        columns=list(columns),
        seeds=[sample.seed for sample in samples],
        versions=found,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _fingerprint(model: str) -> str | None:
    """Of the files of a model, or of a backend's file as far as answers depend on it: on what it names."""
    from popi.assembly import FILES, answers_rest_on
    from popi.models import fingerprint

    if not model.endswith(FILES):
        return fingerprint(model)
    what, models = answers_rest_on(Path(model))
    parts = [what, *map(fingerprint, models)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


async def _measure(
    samples: Sequence[Sample],
    rows: Sequence[Row],
    columns: Sequence[str],
    writer: str,
    made_from: Mapping[str, str],
    folder: Folder,
    config: RunConfig,
) -> Results:
    from popi.evaluation.run import evaluate
    from popi.registry import inference

    users = sum(len(sample.examples) for sample in samples)
    async with opened((writer, *columns, *made_from.values())) as backends:
        write = inference("llm")
        before = {name: backends[made] for name, made in made_from.items()}
        with progress("evaluation", users * len(rows) * len(columns)) as shown:
            return await evaluate(
                samples,
                rows=rows,
                # Not by the model's name: the backends of two files may have the same model.
                columns=[column(backends[name], before.get(name), name=name) for name in columns],
                writer=write(backends[writer]),
                untrained=write(before[writer]) if writer in before else None,
                folder=folder,
                judged=JUDGED,
                settings={**config.settings, "seeds": config.seeds},
                advance=shown.advance,
            )


def _write(results: Results, folder: Folder) -> None:
    from popi.evaluation.figure import draw_accuracy
    from popi.evaluation.report import FIGURE, markdown

    folder.write("results.json", results.model_dump_json(indent=2) + "\n")
    try:
        draw_accuracy(results, folder.path / FIGURE)
    except MissingExtra as error:
        note(f"no figure: {error}")
        drawn = False
    else:
        drawn = True
    folder.write("results.md", markdown(results, figure=drawn))
