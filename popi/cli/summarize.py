"""``popi summarize``: one summary a user, never twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from popi.cli.output import JsonFlag, note, print_records, progress
from popi.errors import InputError, PopiError

if TYPE_CHECKING:
    from popi.cli.growing import GrowingFile
    from popi.roles import PreferenceInference
    from popi.signals import UserSignals


def summarize(
    signals: Annotated[Path, typer.Option(help="JSON lines: users' signals, or examples that hold them.")],
    model: Annotated[str, typer.Option(help="Name of a shipped model, path, hub id, or a backend's YAML file.")],
    out: Annotated[Path, typer.Option(help="JSON lines: where the summaries go, one a user.")],
    inference: Annotated[str, typer.Option(help="What writes them: llm, raw, empty, or module:Class.")] = "llm",
    budget: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of signals shown [default: what the model has room for].")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a summary [default: 256].")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Of sampling [default: 0, greedy].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling [default: 0].")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Users at once.")] = 64,
    json: JsonFlag = False,
) -> None:
    """Read users' signals and write a summary for each.

    The same command again goes on where it stopped. A user whose signals have changed since is summarized anew,
    unless a person has edited the summary: an edit stays. Beside the summaries lies a file .meta.json with the
    settings; a file made with others is refused.
    """
    import asyncio

    from popi import registry
    from popi.cli.batches import (
        accounted,
        affordable,
        check_settings,
        closing,
        identity,
        keep_settings,
        load_backend,
        telling,
    )
    from popi.cli.growing import GrowingFile
    from popi.io import check_rereadable
    from popi.prompts import DEFAULT

    sampling = {"budget": budget, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in sampling.items() if value is not None}
    options = registry.inference_options(inference, **given)
    settings = {"model": identity(model), "inference": inference, **options, "template_hash": DEFAULT.hash}
    check_rereadable(signals)
    with GrowingFile(out) as lines:
        if lines.repaired:
            note(f"{out} ended in half a line, which was dropped")
        done = _read_done(out)
        plan = _survey(signals, done)
        check_settings(out, settings)
        report = Report(users=plan.users, already_done=plan.users - plan.pending)
        if plan.edits_kept:
            note(f"{plan.edits_kept} edited summaries are kept although the signals have changed since")
        if plan.pending:
            with telling(f"what is finished is kept in {out}, and the same command goes on"):
                backend, ledger = load_backend(model, "inference")
                writer = registry.make_inference(inference, backend, **options)
                _check_writer(out, done, writer.name)
                keep_settings(out, settings)
                users = affordable(_pending(signals, done, plan), ledger)
                with accounted(ledger):
                    asyncio.run(closing(backend, _work(writer, users, lines, report, plan, batch_size)))
    print_records([report.as_record(out)], json_flag=json)
    if report.failed:
        raise PopiError(f"{report.failed} of {report.users} users have no summary; the same command tries them again")


class Done(NamedTuple):
    """A summary that is there: its line, what it was made from and by, and whether a person has edited it."""

    line: int
    signals_digest: str
    model: str
    edited: bool


@dataclass(slots=True)
class Plan:
    """What is to be done.

    Attributes:
        users: How many there are.
        pending: How many need a summary.
        stale: The line of each of these whose signals have changed since there was one.
        edits_kept: How many have one that a person has edited, and other signals since.
    """

    users: int = 0
    pending: int = 0
    stale: dict[str, int] = field(default_factory=dict)
    edits_kept: int = 0


@dataclass(slots=True)
class Report:
    """What was done, in users."""

    users: int
    already_done: int
    written: int = 0
    not_enough_evidence: int = 0
    failed: int = 0

    def as_record(self, out: Path) -> dict[str, object]:
        """As it is printed."""
        return {
            "users": self.users,
            "already done": self.already_done,
            "written": self.written,
            "of these without evidence": self.not_enough_evidence,
            "failed": self.failed,
            "out": str(out),
        }


def _read_done(out: Path) -> dict[str, Done]:
    from popi.cli.summaries import read_summaries
    from popi.summary import Author

    return {
        summary.user_id: Done(
            line=number,
            signals_digest=summary.provenance.signals_digest,
            model=summary.provenance.model,
            edited=summary.provenance.author is Author.EDITED,
        )
        for number, summary in (read_summaries(out) if out.exists() else ())
    }


def _survey(signals: Path, done: dict[str, Done]) -> Plan:
    """Reads all signals once before any model is loaded, so that a broken line is found now and not in an hour."""
    from popi.data.reading import read_users

    plan = Plan()
    for user in read_users(signals):
        plan.users += 1
        before = done.get(user.user_id)
        if before is None:
            plan.pending += 1
        elif before.signals_digest != user.digest():
            if before.edited:
                plan.edits_kept += 1
            else:
                plan.pending += 1
                plan.stale[user.user_id] = before.line
    return plan


def _pending(signals: Path, done: dict[str, Done], plan: Plan) -> Iterator[UserSignals]:
    from popi.data.reading import read_users

    for user in read_users(signals):
        if user.user_id not in done or user.user_id in plan.stale:
            yield user


def _check_writer(out: Path, done: dict[str, Done], name: str) -> None:
    other = next((entry for entry in done.values() if not entry.edited and entry.model != name), None)
    if other is not None:
        raise InputError(
            f"the summary is by {other.model!r}, not by {name!r}", file=out, line=other.line, fix="give another --out"
        )


async def _work(
    writer: PreferenceInference,
    users: Iterator[UserSignals],
    lines: GrowingFile,
    report: Report,
    plan: Plan,
    batch_size: int,
) -> None:
    from popi.cli.batches import Outcome, append_batches
    from popi.io import as_line
    from popi.roles import Failure

    async def infer(batch: list[UserSignals]) -> list[Outcome]:
        outcomes = []
        for found in await writer.try_infer(batch):
            if isinstance(found, Failure):
                outcomes.append(Outcome(error=f"no summary of user {found.user_id!r}: {found.error}"))
            else:
                report.not_enough_evidence += found.status == "not_enough_evidence"
                outcomes.append(Outcome(as_line(found), plan.stale.get(found.user_id)))
        return outcomes

    with progress("summaries", plan.pending) as shown:
        report.written, report.failed = await append_batches(users, infer, lines, shown, batch_size)
