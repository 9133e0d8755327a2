"""Files of summaries: reading them, and the work of ``popi summarize``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

from popi.backends.together import closing
from popi.cli.batches import check_settings, keep_settings, reporting_cost, within_budget
from popi.cli.growing import GrowingFile
from popi.cli.output import Progress, note, progress
from popi.concurrency import in_groups
from popi.data.reading import read_users
from popi.errors import ConfigError, InputError
from popi.io import BadRows, as_line, read_jsonl
from popi.personalizer import Personalizer
from popi.prompts import check_template_hash
from popi.roles import Failure
from popi.signals import UserSignals
from popi.summary import Author, PreferenceSummary


def read_summaries(path: Path) -> Iterator[tuple[int, PreferenceSummary]]:
    """Reads one summary per user, with its line number.

    Raises:
        InputError: If a line is not a summary, a user occurs twice, or a summary was made with unknown prompt templates
            and no person has edited it since.
    """
    lines: dict[str, int] = {}
    for number, summary in read_jsonl(path, PreferenceSummary):
        if summary.user_id in lines:
            raise InputError(
                f"user {summary.user_id!r} is already in line {lines[summary.user_id]}",
                file=path,
                line=number,
                field="user_id",
                fix="remove one of the lines",
            )
        if summary.provenance.author is not Author.EDITED:
            check_template_hash(summary.provenance.template_hash, where=f"{path}:{number}")
        lines[summary.user_id] = number
        yield number, summary


MOST_REASONS, OTHER_REASONS = 100, "other reasons"


class Done(NamedTuple):
    """An existing summary: its line, the signals that it was made from, its writer, and whether it was edited."""

    line: int
    signals_digest: str
    writer: str
    edited: bool


class Job:
    """The users who need a summary, and the file of summaries.

    All signals are read before a model is loaded, so that bad rows are reported early.

    Args:
        lines: The file of summaries.
        signals: The file of signals.
        skip_bad_rows: Whether to continue without bad rows.

    Raises:
        InputError: If a file cannot be read, or has bad rows that are not to be skipped.

    Attributes:
        users: Number of users.
        pending: Number of users who need a summary.
        edits_kept: Number of edited summaries whose signals have changed.
        written: Number of summaries that were written.
        failed: Number of users without a summary.
        tokens: Number of tokens of the summaries that were written, by the tokenizer of the model.
        reasons: Number of users without a summary, by reason. After :data:`MOST_REASONS` reasons, the rest is counted
            together.
    """

    def __init__(self, lines: GrowingFile, signals: Path, *, skip_bad_rows: bool) -> None:
        self._lines, self._signals, self._skip_bad_rows = lines, signals, skip_bad_rows
        self.users = self.pending = self.edits_kept = self.written = self.failed = self._not_enough_evidence = 0
        self.tokens = 0
        self.reasons: Counter[str] = Counter()
        self._done = _read_done(lines.path)
        self._stale: dict[str, int] = {}
        bad_rows = BadRows(skip=skip_bad_rows)
        for user in read_users(signals, bad_rows=bad_rows):
            self._survey(user)
        if bad_rows.count:
            note(bad_rows.summary())

    def _survey(self, user: UserSignals) -> None:
        self.users += 1
        before = self._done.get(user.user_id)
        if before is None:
            self.pending += 1
        elif before.signals_digest != user.digest():
            if before.edited:
                self.edits_kept += 1
            else:
                self.pending += 1
                self._stale[user.user_id] = before.line

    def pending_users(self) -> Iterator[UserSignals]:
        """Reads the users who need a summary."""
        for user in read_users(self._signals, bad_rows=BadRows(skip=self._skip_bad_rows)):
            if user.user_id not in self._done or user.user_id in self._stale:
                yield user

    def check(self, settings: Mapping[str, Any], writer: str) -> None:
        """Checks that the existing summaries have these settings and this writer, and records the settings.

        Raises:
            InputError: If they have others.
        """
        for done in self._done.values():
            if not done.edited and done.writer != writer:
                raise InputError(
                    f"the summary is by {done.writer!r}, not by {writer!r}",
                    file=self._lines.path,
                    line=done.line,
                    fix="name another file with --out",
                )
        check_settings(self._lines.path, settings)
        keep_settings(self._lines.path, settings)

    def keep(self, summaries: Sequence[PreferenceSummary]) -> None:
        """Writes summaries. They are on the disk when this returns."""
        self._lines.append([as_line(summary) for summary in summaries if summary.user_id not in self._stale])
        for summary in summaries:
            if summary.user_id in self._stale:
                self._lines.replace(self._stale[summary.user_id], as_line(summary))
        self.written += len(summaries)
        self.tokens += sum(summary.provenance.tokens for summary in summaries)
        self._not_enough_evidence += sum(summary.status == "not_enough_evidence" for summary in summaries)

    def fail(self, user_id: str, failure: Failure, shown: Progress) -> None:
        """Counts and prints a failure. The end of the budget is printed once, at the end."""
        self.failed += 1
        known = failure.error in self.reasons or len(self.reasons) < MOST_REASONS
        self.reasons[failure.error if known else OTHER_REASONS] += 1
        if failure.failure != "budget":
            shown.note(f"no summary of user {user_id!r}: {failure.error}")

    def report(self) -> dict[str, object]:
        """The result, in numbers of users."""
        return {
            "users": self.users,
            "already done": self.users - self.pending,
            "written": self.written,
            "of these without evidence": self._not_enough_evidence,
            "failed": self.failed,
            "out": str(self._lines.path),
        }


def _read_done(out: Path) -> dict[str, Done]:
    return {
        summary.user_id: Done(
            line=number,
            signals_digest=summary.provenance.signals_digest,
            writer=summary.provenance.model,
            edited=summary.provenance.author is Author.EDITED,
        )
        for number, summary in (read_summaries(out) if out.exists() else ())
    }


class SummaryWriter:
    """Writes summaries with one model. It is an asynchronous context manager, which closes the model.

    Args:
        personalizer: Infers the summaries.
        settings: The settings that the summaries depend on.
        max_concurrency: Maximum number of users at the same time.

    Raises:
        ConfigError: If the inference does not infer summaries.
    """

    def __init__(self, personalizer: Personalizer, settings: Mapping[str, Any], max_concurrency: int) -> None:
        inference = personalizer.inference
        assert inference is not None
        if inference.kind != "summary":
            raise ConfigError(f"the inference {settings['inference']!r} does not infer summaries")
        self._personalizer, self._max_concurrency = personalizer, max_concurrency
        self._name = inference.name
        self.template_hash = None if inference.format is None else inference.format.template_hash
        self._settings = {**settings, "template_hash": self.template_hash}
        [self._ledger] = personalizer.ledgers

    @classmethod
    def load(cls, settings: Mapping[str, Any], options: Mapping[str, Any], max_concurrency: int) -> Self:
        """Loads the model.

        Raises:
            InputError: If the model or its options cannot be used.
        """
        personalizer = Personalizer.load(
            settings["model"], inference=settings["inference"], generation=None, inference_options=options
        )
        return cls(personalizer, settings, max_concurrency)

    async def __aenter__(self) -> Self:
        await self._personalizer.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._personalizer.__aexit__(*error)

    def spent(self) -> dict[str, int]:
        """Requests so far, and the tokens that the servers counted. All are zero for a model in this process."""
        total = self._ledger.total
        return {
            "requests": total.requests,
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
        }

    async def write(self, job: Job, label: str = "summaries", shown: Progress | None = None) -> None:
        """Writes the summaries of a job.

        Args:
            job: The job.
            label: Its name in the progress.
            shown: Shows the progress; ``None`` is a bar, or lines.

        Raises:
            InputError: If the existing summaries have other settings.
            PopiError: If the backend is not available, or the budget is spent.
        """
        job.check(self._settings, self._name)
        users = within_budget(job.pending_users(), self._ledger)
        showing = nullcontext(shown) if shown else progress(label, job.pending, "users")
        with reporting_cost(self._ledger), showing as display:
            summaries = self._personalizer.summarize(users, max_concurrency=self._max_concurrency)
            async with closing(in_groups(summaries)) as groups:
                async for group in groups:
                    job.keep([outcome for _, outcome in group if isinstance(outcome, PreferenceSummary)])
                    for user, outcome in group:
                        if isinstance(outcome, Failure):
                            job.fail(user.user_id, outcome, display)
                    display.advance(len(group))
        # Only the total is shown. The accounts of all users of all shards would fill the memory.
        self._ledger.forget_users()
