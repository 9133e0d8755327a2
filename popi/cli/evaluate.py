"""``popi eval``: what a generator gains from summaries, with controls and confidence intervals."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from popi.cli.output import JsonFlag, note, print_json, print_table, progress, wants_json
from popi.errors import ConfigError, MissingExtra, PopiError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from popi.backends.base import Backend
    from popi.evaluation.folder import Folder, RunConfig
    from popi.evaluation.measure import Column
    from popi.evaluation.results import Results
    from popi.evaluation.rows import Row
    from popi.evaluation.samples import Sample
    from popi.io import BadRows

JUDGED = 200
"""Number of users per sample whose responses are judged. Writing a response costs much more than scoring one."""

WORLD_USERS = 1000
"""Default number of users per sample of a world."""

GENERATORS = ("popi-mini-base", "popi-mini-generator", "popi-mini-reader")


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for the figures and the measurements of each user.")],
    data: Annotated[Path | None, typer.Option(help="JSON lines: examples with held-out pairs.")] = None,
    world: Annotated[str | None, typer.Option(help="Make the users instead: miniworld.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the world [default: unseen-combinations].")] = None,
    users: Annotated[
        int | None, typer.Option(min=1, help="Users per sample [default: 1000 of a world, all of a file].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of samples of users, each with its own seed.")] = 1,
    writer: Annotated[
        str, typer.Option(help="The model that writes the summaries: name, path, hub id or YAML file.")
    ] = "popi-mini-writer",
    generator: Annotated[
        list[str] | None,
        typer.Option(help=f"A column: a model, like --writer; may be repeated [default: {', '.join(GENERATORS)}]."),
    ] = None,
    prompt_set: Annotated[
        str | None,
        typer.Option(
            help="Prompt set of all models: its name, or a YAML file [default: the one that each was trained with]."
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="Names of rows, separated by commas [default: all].")] = "",
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Continue without the bad rows of DATA, and print their number.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Measure what a generator gains from the summaries of a writer.

    A model that popi trained is compared with the model that it was trained from, under the same prompts: a writer by
    its summaries, a generator by its likelihoods.

    OUT receives results.json, results.md, accuracy_vs_context.png and config.json. The same command resumes an
    interrupted run. Rows, generators and seeds can be added to a folder; other settings are refused.
    """
    import asyncio

    from popi.registry import load

    load("numpy")  # not in the base installation: the error names the extra
    from popi.cli.batches import explaining_errors, identity
    from popi.evaluation import rows as table
    from popi.evaluation.folder import Folder
    from popi.io import BadRows
    from popi.trained import training_record

    columns = list(dict.fromkeys(map(identity, generator or GENERATORS)))
    writer = identity(writer)
    records = {name: training_record(name) for name in (writer, *columns)}
    made_from = {name: made for name, record in records.items() if record and (made := record.made_from) is not None}
    chosen = table.choose([name.strip() for name in rows.split(",") if name.strip()], trained=writer in made_from)
    bad_rows = BadRows(skip=skip_bad_rows)
    samples, source = _samples(data, world, split, users, list(range(seed, seed + seeds)), bad_rows)
    if bad_rows.count:
        note(bad_rows.summary())
    folder = Folder(out)
    config = folder.open(run_config(source, samples, chosen, columns, writer, made_from, prompt_set=prompt_set))
    start = time.monotonic()
    with explaining_errors(f"measurements are kept in {out}, and the same command resumes the run"):
        try:
            results = asyncio.run(_measure(samples, chosen, columns, writer, made_from, prompt_set, folder, config))
        finally:
            folder.close(config, time.monotonic() - start)
        _write(results, folder)
    show(results, as_json=wants_json(json))
    note(f"written to {out}")
    if all(cell.unavailable is not None for cell in results.cells):
        raise PopiError(f"no accuracy could be measured: {results.cells[0].unavailable}")


def show(results: Results, *, as_json: bool) -> None:
    """Prints the tables and their remarks, or one JSON line per figure."""
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
    """Opens the backends of models, each once. At the end it closes them and prints their cost."""
    from popi.cli.batches import load_backend, reporting_cost

    async with AsyncExitStack() as stack:
        found = {}
        for name in dict.fromkeys(models):
            backend, ledger = load_backend(name, "evaluation")
            stack.enter_context(reporting_cost(ledger, name))
            found[name] = await stack.enter_async_context(backend)
        yield found


def column(backend: Backend, reference: Backend | None = None, *, name: str = "", prompts: str | None = None) -> Column:
    """Makes a generator under test from a backend.

    Args:
        backend: The backend of the model.
        reference: The backend of the model that it was trained from, if any. It gets the same prompts.
        name: The name of the column; empty is that of the model.
        prompts: A prompt set, or a YAML file; ``None`` is the set that the model was trained with.
    """
    from popi.evaluation.measure import Column
    from popi.registry import generator
    from popi.trained import prompts_of

    make, chosen = generator("prompted"), prompts_of(backend.model, prompts)
    before = None if reference is None else make(reference, prompts=chosen)
    return Column(name or backend.model, make(backend, prompts=chosen), backend, before)


def _samples(
    data: Path | None,
    world: str | None,
    split: str | None,
    users: int | None,
    seeds: Sequence[int],
    bad_rows: BadRows,
) -> tuple[list[Sample], dict[str, object]]:
    """The users, and the settings that determine them."""
    from popi.evaluation import samples
    from popi.provenance import fingerprint_files

    if (data is None) == (world is None):
        raise ConfigError("users come either from --data FILE or from --world miniworld", fix="give one of the two")
    if data is not None:
        if split is not None:
            raise ConfigError("a file has no splits", field="split", fix="remove --split")
        made = samples.from_file(data, users=users, seeds=seeds, bad_rows=bad_rows)
        source = {
            "data": str(data.resolve()),
            "data_files": fingerprint_files(data),
            "dealt_by_seed": seeds[0],
            **({"skipped_bad_rows": bad_rows.count} if bad_rows.count else {}),
        }
    else:
        assert world is not None
        split = split or "unseen-combinations"
        users = users or WORLD_USERS
        with progress("users", users * len(seeds), transient=True) as shown:
            made = samples.from_world(world, split=split, users=users, seeds=seeds, advance=shown.advance)
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
    prompt_set: str | None = None,
) -> RunConfig:
    """The configuration of a run: everything that its figures depend on."""
    from popi.evaluation.folder import RunConfig
    from popi.prompts import DEFAULT
    from popi.provenance import versions
    from popi.registry import load
    from popi.trained import prompts_of

    found = versions()
    return RunConfig(
        settings={
            **source,
            "writer": writer,
            "judged": judged,
            # Margins are differences of scores, which must have the same precision.
            "dtype": load("popi.engine.loading:default_dtype")(),
            "template_hash": DEFAULT.hash if prompt_set is None else prompts_of(writer, prompt_set).hash,
            "popi": found["popi"],
        },
        models={name: _identity(name) for name in (writer, *columns, *made_from.values())},
        rows=[row.name for row in rows],
        columns=list(columns),
        seeds=[sample.seed for sample in samples],
        versions=found,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _identity(model: str) -> str | None:
    """The fingerprint of a model, and its dtype if ``auto`` selects another one for it than for most models."""
    from popi.assembly import fingerprint_model
    from popi.config import FILES
    from popi.models import folder_of
    from popi.registry import load

    fingerprint = fingerprint_model(model)
    folder = None if model.endswith(FILES) else folder_of(model)
    if fingerprint is None or folder is None:
        return fingerprint
    try:
        dtype = load("popi.engine.loading:auto_dtype")(str(folder))
    except (OSError, ValueError):
        # The error of a broken configuration is raised when the model is loaded.
        return fingerprint
    return fingerprint if dtype == load("popi.engine.loading:default_dtype")() else f"{fingerprint} in {dtype}"


async def _measure(
    samples: Sequence[Sample],
    rows: Sequence[Row],
    columns: Sequence[str],
    writer: str,
    made_from: Mapping[str, str],
    prompt_set: str | None,
    folder: Folder,
    config: RunConfig,
) -> Results:
    from popi.evaluation.run import evaluate
    from popi.registry import inference
    from popi.trained import prompts_of

    users = sum(len(sample.examples) for sample in samples)
    async with opened((writer, *columns, *made_from.values())) as backends:
        write = inference("llm")
        prompts = prompts_of(backends[writer].model, prompt_set)
        before = {name: backends[made] for name, made in made_from.items()}
        with progress("evaluation", users * len(rows) * len(columns)) as shown:
            return await evaluate(
                samples,
                rows=rows,
                # Named by the option, because two backend files may have the same model.
                columns=[column(backends[name], before.get(name), name=name, prompts=prompt_set) for name in columns],
                writer=write(backends[writer], prompts=prompts),
                untrained=write(before[writer], prompts=prompts) if writer in before else None,
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
        note(f"no figure was drawn: {error}")
        drawn = False
    else:
        drawn = True
    folder.write("results.md", markdown(results, figure=drawn))
