"""``popi summarize``: writes one summary per user."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from popi.cli.output import JsonFlag, note, print_records
from popi.errors import ConfigError, PopiError

if TYPE_CHECKING:
    from popi.cli.shards import Shard, Totals
    from popi.cli.summaries import SummaryWriter

Result = TypeVar("Result")

ATTEMPTS = 4
"""Maximum number of requests of a user. Seeds are fixed, so another start would get the same replies."""


def summarize(
    signals: Annotated[
        Path,
        typer.Option(help="JSON lines: signals of users, or examples that contain them; or a folder of such files."),
    ],
    model: Annotated[str, typer.Option(help="The model: a shipped name, path, hub id, or YAML file of a backend.")],
    out: Annotated[Path, typer.Option(help="JSON lines: the summaries, one per user; or a folder of such files.")],
    inference: Annotated[str, typer.Option(help="The inference class: llm, raw, empty, or module:Class.")] = "llm",
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum number of tokens of a user's signals [default: as many as fit the model's context]."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens of a summary [default: 256].")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy [default: 0].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling [default: 0].")] = None,
    language: Annotated[
        str | None, typer.Option(help="Language of the summaries, for example German [default: that of each user].")
    ] = None,
    prompt_set: Annotated[
        str | None,
        typer.Option(help="A prompt set: its name, or a YAML file [default: the one that the model was trained with]."),
    ] = None,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Maximum number of users at the same time.")] = 64,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Of a folder: only every N-th file, from the I-th, for one of N processes."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of a folder: divide the files among workers of Ray: local, auto, or the address of a cluster.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of Ray workers [default: the number of GPUs, at least 1]."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0.0, help="GPUs of a worker of Ray [default: 1 if the cluster has any].")
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Continue without the bad rows of SIGNALS, and print their number.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Read the signals of users and write a summary for each.

    Each summary is written as soon as it is finished. The same command resumes an interrupted run. A user whose signals
    have changed is summarized again, unless a person has edited the summary. The settings are recorded in a file next
    to OUT, .meta.json; an OUT that was made with other settings is refused.

    With a folder, OUT becomes a folder: each file of signals, JSON lines or parquet, gets a file of summaries and a
    manifest with counts, failures, tokens and settings. Finished files are skipped. Processes with --shard, or the
    workers of Ray, can share the files.
    """
    from popi import registry
    from popi.cli.batches import identity
    from popi.cli.shards import is_folder_of_shards
    from popi.cli.summaries import SummaryWriter

    names = {
        "budget": budget,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "language": language,
        "prompts": prompt_set,
    }
    given = {name: value for name, value in names.items() if value is not None}
    persistent = {"attempts": ATTEMPTS} if registry.takes(registry.inference(inference), "attempts") else {}
    settings = {
        "model": identity(model),
        "inference": inference,
        **registry.inference_options(inference, **given),
    }
    on_ray = {"--workers": workers, "--gpus-per-worker": gpus_per_worker}
    _check_division(is_folder_of_shards(signals), shard, ray, on_ray)
    load = partial(SummaryWriter.load, settings, given | persistent, max_concurrency)
    if not is_folder_of_shards(signals):
        record = _write_file(signals, out, load, settings, skip_bad_rows)
    else:
        write = partial(_write_shards, load, settings, skip_bad_rows)
        if ray is not None:
            from popi.cli.ray_shards import write_shards

            write = partial(
                write_shards,
                load,
                settings,
                skip_bad_rows,
                address=ray,
                workers=workers,
                gpus_per_worker=gpus_per_worker,
            )
        record = _write_folder(signals, out, shard, write)
    print_records([record], json_flag=json)
    if record["failed"]:
        raise PopiError(
            f"{record['failed']} of {record['users']} users have no summary; the same command tries them again"
        )


def _check_division(is_folder: bool, shard: str | None, ray: str | None, on_ray: Mapping[str, object]) -> None:
    for name, value in {"--shard": shard, "--ray": ray}.items():
        if value is not None and not is_folder:
            raise ConfigError("is for a folder of shards", field=name, fix="name a folder with --signals")
    for name, option in on_ray.items():
        if option is not None and ray is None:
            raise ConfigError("is for workers of Ray", field=name, fix="add --ray local, or the address of a cluster")


def _write_file(
    signals: Path, out: Path, load: Callable[[], SummaryWriter], settings: Mapping[str, Any], skip_bad_rows: bool
) -> dict[str, object]:
    from popi.cli.batches import check_settings
    from popi.cli.growing import GrowingFile
    from popi.cli.summaries import Job
    from popi.io import check_rereadable

    check_rereadable(signals)
    with GrowingFile(out) as lines:
        if lines.repaired:
            note(f"removed an incomplete line at the end of {out}")
        job = Job(lines, signals, skip_bad_rows=skip_bad_rows)
        check_settings(out, settings)
        if job.edits_kept:
            note(f"{job.edits_kept} edited summaries are kept, although their signals have changed")
        if job.pending:
            with _explaining_errors(out):
                asyncio.run(_with_writer(load, lambda writer: writer.write(job)))
    return job.report()


def _write_folder(
    signals: Path, out: Path, shard: str | None, write: Callable[[Sequence[Shard]], Totals]
) -> dict[str, object]:
    from popi.cli.shards import find_shards, parse_part

    shards = find_shards(signals, out, (1, 1) if shard is None else parse_part(shard))
    with _explaining_errors(out):
        totals = write(shards)
    return {"shards": len(shards), **totals.counts, "out": str(out)}


def _write_shards(
    load: Callable[[], SummaryWriter], settings: Mapping[str, Any], skip_bad_rows: bool, shards: Sequence[Shard]
) -> Totals:
    from popi.cli.shards import write_shards

    return asyncio.run(
        _with_writer(load, lambda writer: write_shards(shards, writer, settings, skip_bad_rows=skip_bad_rows))
    )


async def _with_writer(load: Callable[[], SummaryWriter], work: Callable[[SummaryWriter], Awaitable[Result]]) -> Result:
    async with load() as writer:
        return await work(writer)


def _explaining_errors(out: Path) -> AbstractContextManager[None]:
    from popi.cli.batches import explaining_errors

    return explaining_errors(f"finished summaries are kept in {out}, and the same command resumes the run")
