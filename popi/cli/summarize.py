"""``popi summarize``: writes one summary per user."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from popi.cli.output import JsonFlag, note, print_records
from popi.errors import ConfigError, PopiError

if TYPE_CHECKING:
    from popi.cli.shards import Shard, Totals
    from popi.cli.summaries import Job


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
        str | None, typer.Option(help="Name of a prompt set [default: the one that the model was trained with].")
    ] = None,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Maximum number of users at the same time.")] = 64,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Of a folder: only every N-th file, from the I-th, for one of N processes."),
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
    manifest with counts, failures, tokens and settings. Finished files are skipped.
    """
    from popi import registry
    from popi.cli.batches import check_settings, explaining_errors, identity
    from popi.cli.growing import GrowingFile
    from popi.cli.shards import find_shards, is_folder_of_shards, parse_part
    from popi.cli.summaries import Job
    from popi.io import check_rereadable

    names = {
        "budget": budget,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "language": language,
        "prompts": prompt_set,
    }
    given = {name: value for name, value in names.items() if value is not None}
    settings = {
        "model": identity(model),
        "inference": inference,
        **registry.inference_options(inference, **given),
    }
    part = (1, 1) if shard is None else parse_part(shard)
    if is_folder_of_shards(signals):
        shards = find_shards(signals, out, part)
        kept = f"finished summaries are kept in {out}, and the same command resumes the run"
        with explaining_errors(kept):
            totals = asyncio.run(_write_shards(shards, settings, given, max_concurrency, skip_bad_rows))
        print_records([{"shards": len(shards), **totals.counts, "out": str(out)}], json_flag=json)
        if totals.counts["failed"]:
            raise PopiError(
                f"{totals.counts['failed']} of {totals.counts['users']} users have no summary; the same command tries "
                "them again"
            )
        return
    if shard is not None:
        raise ConfigError("is for a folder of shards", field="--shard", fix="name a folder with --signals")
    check_rereadable(signals)
    with GrowingFile(out) as lines:
        if lines.repaired:
            note(f"removed an incomplete line at the end of {out}")
        job = Job(lines, signals, skip_bad_rows=skip_bad_rows)
        check_settings(out, settings)
        if job.edits_kept:
            note(f"{job.edits_kept} edited summaries are kept, although their signals have changed")
        if job.pending:
            with explaining_errors(f"finished summaries are kept in {out}, and the same command resumes the run"):
                asyncio.run(_write(job, settings, given, max_concurrency))
    print_records([job.report()], json_flag=json)
    if job.failed:
        raise PopiError(f"{job.failed} of {job.users} users have no summary; the same command tries them again")


async def _write(job: Job, settings: Mapping[str, Any], options: Mapping[str, Any], max_concurrency: int) -> None:
    from popi.cli.summaries import SummaryWriter

    async with SummaryWriter.load(settings, options, max_concurrency) as writer:
        await writer.write(job)


async def _write_shards(
    shards: Sequence[Shard],
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    max_concurrency: int,
    skip_bad_rows: bool,
) -> Totals:
    from popi.cli.shards import write_shards
    from popi.cli.summaries import SummaryWriter

    async with SummaryWriter.load(settings, options, max_concurrency) as writer:
        return await write_shards(shards, writer, settings, skip_bad_rows=skip_bad_rows)
