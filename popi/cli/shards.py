"""Folders of shards: the work of ``popi summarize`` on many files, each of which has a manifest when it is finished."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from popi.cli.growing import GrowingFile
from popi.cli.output import Progress, note
from popi.cli.summaries import Job, SummaryWriter
from popi.errors import ConfigError, InputError
from popi.io import write_text
from popi.provenance import now, versions

ENDINGS = (".jsonl", ".parquet")
DATASET = "dataset_info.json"
"""A folder with this file is one dataset, not a folder of shards."""


class Shard(NamedTuple):
    """A file of signals, the file of its summaries, and the manifest that is written when all are finished."""

    signals: Path
    out: Path
    manifest: Path

    def source(self) -> dict[str, int]:
        """What changes if the signals are replaced."""
        found = self.signals.stat()
        return {"bytes": found.st_size, "modified": found.st_mtime_ns}

    def finished(self, settings: Mapping[str, Any]) -> bool:
        """Whether all users of these signals have a summary that was made with these settings."""
        try:
            known = json.loads(self.manifest.read_text(encoding="utf-8"))
            return bool(
                known["source"] == self.source()
                and known["users_failed"] == 0
                and known["settings"] == json.loads(json.dumps(settings, default=str))
                and self.out.exists()
            )
        except (OSError, ValueError, LookupError, TypeError):
            return False


def is_folder_of_shards(signals: Path) -> bool:
    """Whether a path is a folder of files, and not a dataset."""
    return signals.is_dir() and not (signals / DATASET).exists()


def parse_part(text: str) -> tuple[int, int]:
    """Parses ``3/64``, the third of 64 parts.

    Raises:
        ConfigError: If it is not a part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise ConfigError(f"invalid shard {text!r}", field="--shard", fix="write I/N with I from 1 to N, as in 3/64")
    return part


def find_shards(signals: Path, out: Path, part: tuple[int, int] = (1, 1)) -> list[Shard]:
    """Lists the shards of a folder, or every n-th of them.

    Args:
        signals: The folder. Files in folders below it count, hidden ones do not.
        out: The folder of the summaries.
        part: Which of how many processes this is. Each shard belongs to one of them.

    Raises:
        InputError: If the folder has no shards, or two that would have the same file of summaries, or if the summaries
            would be written into it.
    """
    if out.resolve().is_relative_to(signals.resolve()):
        raise InputError(f"is in the folder of the signals, {signals}", file=out, fix="name a folder outside of it")
    files = sorted(
        file
        for file in signals.rglob("*")
        if file.suffix in ENDINGS and not any(name.startswith(".") for name in file.relative_to(signals).parts)
    )
    if not files:
        raise InputError(f"contains no {' or '.join(ENDINGS)} files", file=signals, fix="name the folder of the shards")
    names = [file.relative_to(signals).with_suffix(".jsonl") for file in files]
    times = Counter(names)
    for name, file in zip(names, files, strict=True):
        if times[name] > 1:
            raise InputError("exists with two endings", file=file, fix="remove one of the files")
    found = [
        Shard(file, out / name, (out / name).with_suffix(".manifest.json"))
        for name, file in zip(names, files, strict=True)
    ]
    return found[part[0] - 1 :: part[1]]


class Totals:
    """The sums over the shards of a command."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("users", "already done", "written", "of these without evidence", "failed"), 0)

    def add(self, report: Mapping[str, Any]) -> None:
        """Adds the report of a shard."""
        for name in self.counts:
            self.counts[name] += report[name]


async def write_shards(
    shards: Sequence[Shard], writer: SummaryWriter, settings: Mapping[str, Any], *, skip_bad_rows: bool
) -> Totals:
    """Writes the summaries of each shard, and its manifest. Finished shards are skipped.

    Raises:
        InputError: If a shard cannot be read, or has bad rows that are not to be skipped.
        PopiError: If the backend is not available, or a file cannot be written.
    """
    totals = Totals()
    for place, shard in enumerate(shards, start=1):
        label = f"shard {place} of {len(shards)}"
        totals.add(await write_shard(shard, writer, settings, skip_bad_rows=skip_bad_rows, label=label))
    return totals


async def write_shard(
    shard: Shard,
    writer: SummaryWriter,
    settings: Mapping[str, Any],
    *,
    skip_bad_rows: bool,
    label: str,
    shown: Progress | None = None,
) -> dict[str, Any]:
    """Writes the summaries of a shard, and its manifest, unless it is finished.

    Args:
        shard: The shard.
        writer: Writes the summaries.
        settings: The settings that the summaries depend on.
        skip_bad_rows: Whether to continue without bad rows.
        label: The name of the shard in the progress.
        shown: Shows the progress; ``None`` is a bar, or lines.

    Returns:
        The report of the shard.

    Raises:
        LockedError: If another process writes the shard.
        InputError: If the shard cannot be read, or has bad rows that are not to be skipped.
        PopiError: If the backend is not available, or a file cannot be written.
    """
    settings = {**settings, "template_hash": writer.template_hash}
    if shard.finished(settings):
        known: dict[str, Any] = json.loads(shard.manifest.read_text(encoding="utf-8"))["report"]
        return known
    began, started, before = perf_counter(), now(), writer.spent()
    source = shard.source()
    with GrowingFile(shard.out) as lines:
        job = Job(lines, shard.signals, skip_bad_rows=skip_bad_rows)
        if job.edits_kept:
            note(f"{job.edits_kept} edited summaries are kept, although their signals have changed")
        await writer.write(job, label, shown)
    report = job.report()
    spent = {name: value - before[name] for name, value in writer.spent().items()}
    manifest = {
        "source": source,
        "settings": settings,
        "users_failed": job.failed,
        "failures": job.reasons,
        "report": {**report, "out": str(shard.out)},
        "summary_tokens": job.tokens,
        **(spent if spent["requests"] else {}),
        "seconds": round(perf_counter() - began, 1),
        "started": started,
        "versions": versions(),
    }
    write_text(shard.manifest, json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n")
    note(f"finished {shard.signals.name}: {report['written']} written, {job.failed} failed")
    return report
