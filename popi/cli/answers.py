"""``popi generate`` with many prompts: one line per response."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from popi import registry
from popi.backends.base import FinishReason
from popi.backends.together import closing
from popi.cli.batches import check_settings, explaining_errors, identity, keep_settings, reporting_cost, within_budget
from popi.cli.growing import GrowingFile
from popi.cli.output import Progress, note, print_records, progress
from popi.cli.summaries import read_summaries
from popi.concurrency import in_groups
from popi.errors import InputError, PopiError, did_you_mean
from popi.io import BadRows, as_line, check_rereadable, parse_lines, read_jsonl, validate
from popi.personalizer import Personalizer
from popi.response import Response
from popi.roles import Conditioned, Failure
from popi.signals import FileRecord, Text, UserId
from popi.summary import PreferenceSummary


class PromptLine(FileRecord):
    """One prompt. Without a user it is a plain prompt."""

    user_id: UserId | None = None
    prompt: Text


class Answer(BaseModel):
    """One response.

    Attributes:
        line: The line of the prompt.
        user_id: The user.
        prompt: The prompt.
        response: The response.
        finish_reason: ``length`` if the response was truncated.
        prompt_tokens: Length of the rendered conversation.
        completion_tokens: Length of the response.
        model: The model that responded.
        route: The route that served the request, if there are several.
        fingerprint: Fingerprint of user, prompt and summary.
        template_hash: Hash of the prompt templates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    line: int
    user_id: str | None
    prompt: str
    response: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    model: str
    route: str = ""
    fingerprint: str
    template_hash: str


@dataclass(frozen=True, slots=True)
class Question(Conditioned):
    """A prompt of the file.

    Attributes:
        line: Its line.
        user: The user, or ``None``.
        answered: Whether it has a response already.
    """

    line: int = 0
    user: str | None = None
    answered: bool = False

    def fingerprint(self) -> str:
        """Fingerprint of user, prompt and summary, 16 hex digits."""
        summary = self.interface.text if isinstance(self.interface, PreferenceSummary) else None
        return hashlib.sha256(repr((self.user, self.prompt, summary)).encode()).hexdigest()[:16]


def load_summaries(path: Path) -> dict[str, PreferenceSummary]:
    """Reads the summary of each user, without its claims, since a generator reads the text.

    Raises:
        InputError: As :func:`read_summaries`.
    """
    return {summary.user_id: summary.model_copy(update={"claims": ()}) for _, summary in read_summaries(path)}


class Job:
    """The prompts without a response, and the file of responses.

    All prompts are read before a model is loaded, so that bad rows are reported early.

    Args:
        lines: The file of responses.
        prompts: The file of prompts.
        summaries: The file of summaries; ``None`` if all prompts are plain.
        skip_bad_rows: Whether to continue without bad rows.

    Raises:
        InputError: If a file cannot be read, has bad rows that are not to be skipped, or a prompt or summary has
            changed since it had a response.

    Attributes:
        prompts: Number of prompts.
        pending: Number of prompts without a response.
        written: Number of responses that were written.
        truncated: Number of these that are truncated.
        failed: Number of prompts that failed.
    """

    def __init__(self, lines: GrowingFile, prompts: Path, summaries: Path | None, *, skip_bad_rows: bool) -> None:
        self._lines, self._prompts, self._skip_bad_rows = lines, prompts, skip_bad_rows
        self._summaries = None if summaries is None else load_summaries(summaries)
        self._fingerprints = (
            {answer.line: answer.fingerprint for _, answer in read_jsonl(lines.path, Answer)}
            if lines.path.exists()
            else {}
        )
        self.prompts = self.pending = self.written = self.truncated = self.failed = 0
        bad_rows = BadRows(skip=skip_bad_rows)
        for question in self._questions(bad_rows):
            self.prompts += 1
            self.pending += not question.answered
        if bad_rows.count:
            note(bad_rows.summary())

    def pending_questions(self) -> Iterator[Question]:
        """Reads the prompts without a response."""
        return (question for question in self._questions(BadRows(skip=self._skip_bad_rows)) if not question.answered)

    def keep(self, responses: Sequence[tuple[Question, Response]], template_hash: str) -> None:
        """Writes responses. They are on the disk when this returns."""
        self._lines.append([as_line(_answer(*each, template_hash)) for each in responses])
        self.written += len(responses)
        self.truncated += sum(response.finish_reason == "length" for _, response in responses)

    def fail(self, question: Question, failure: Failure, shown: Progress) -> None:
        """Counts and prints a failure. The end of the budget is printed once, at the end."""
        self.failed += 1
        if failure.failure != "budget":
            shown.note(f"no response to line {question.line}: {failure.error}")

    def report(self) -> dict[str, object]:
        """The result, in numbers of prompts."""
        return {
            "prompts": self.prompts,
            "already done": self.prompts - self.pending,
            "written": self.written,
            "of these truncated": self.truncated,
            "failed": self.failed,
            "out": str(self._lines.path),
        }

    def _questions(self, bad_rows: BadRows) -> Iterator[Question]:
        return (question for _, question in parse_lines(self._prompts, self._read, bad_rows=bad_rows))

    def _read(self, number: int, record: Any) -> Question:
        line = validate(PromptLine, record, file=self._prompts, line=number)
        summary = None
        if self._summaries is not None and line.user_id is not None:
            summary = self._summaries.get(line.user_id)
            if summary is None:
                raise InputError(
                    f"no summary of user {line.user_id!r}",
                    file=self._prompts,
                    line=number,
                    field="user_id",
                    fix=did_you_mean(line.user_id, self._summaries),
                )
        question = Question(line.prompt, summary, number, line.user_id, number in self._fingerprints)
        if question.answered and self._fingerprints[number] != question.fingerprint():
            raise InputError(
                "the prompt or the summary has changed since the response was written",
                file=self._prompts,
                line=number,
                fix="name another file with --out",
                skippable=False,
            )
        return question


def _answer(question: Question, response: Response, template_hash: str) -> Answer:
    return Answer(
        line=question.line,
        user_id=question.user,
        prompt=question.prompt,
        response=response.text,
        finish_reason=response.finish_reason,
        prompt_tokens=response.prompt_tokens,
        completion_tokens=response.completion_tokens,
        model=response.model,
        route=response.route,
        fingerprint=question.fingerprint(),
        template_hash=template_hash,
    )


def answer_all(
    prompts: Path,
    out: Path,
    model: str,
    generation: str,
    options: Mapping[str, Any],
    *,
    summaries: Path | None,
    max_concurrency: int,
    skip_bad_rows: bool,
    json: bool,
) -> None:
    """Responds to the prompts that have no response in ``out``.

    Raises:
        InputError: If a file cannot be read, or ``out`` was made with other settings.
        PopiError: If the backend is not available, the budget is spent, or some prompts have no response.
    """
    check_rereadable(prompts)
    settings = {
        "model": identity(model),
        "generation": generation,
        **registry.generator_options(generation, **options),
    }
    with GrowingFile(out) as lines:
        if lines.repaired:
            note(f"removed an incomplete line at the end of {out}")
        job = Job(lines, prompts, summaries, skip_bad_rows=skip_bad_rows)
        check_settings(out, settings)
        if job.pending:
            with explaining_errors(f"finished responses are kept in {out}, and the same command resumes the run"):
                _run(job, out, settings, options, max_concurrency)
    print_records([job.report()], json_flag=json)
    if job.truncated:
        note(f"{job.truncated} responses were truncated; raise max_tokens")
    if job.failed:
        raise PopiError(f"{job.failed} of {job.prompts} prompts have no response; the same command tries them again")


def _run(job: Job, out: Path, settings: Mapping[str, Any], options: Mapping[str, Any], max_concurrency: int) -> None:
    personalizer = Personalizer.load(
        settings["model"], inference=None, generation=settings["generation"], generator_options=options
    )
    asyncio.run(_write(job, personalizer, out, settings, max_concurrency))


async def _write(
    job: Job, personalizer: Personalizer, out: Path, settings: Mapping[str, Any], max_concurrency: int
) -> None:
    generator, [ledger] = personalizer.generator, personalizer.ledgers
    assert generator is not None
    async with personalizer:
        template_hash = "" if generator.format is None else generator.format.template_hash
        settings = {**settings, "template_hash": template_hash}
        check_settings(out, settings)
        keep_settings(out, settings)
        questions = within_budget(job.pending_questions(), ledger)
        with reporting_cost(ledger), progress("responses", job.pending, "prompts") as shown:
            outcomes = personalizer.respond_many(questions, max_concurrency=max_concurrency)
            async with closing(in_groups(outcomes)) as groups:
                async for group in groups:
                    job.keep(
                        [(asked, answer) for asked, answer in group if isinstance(answer, Response)], template_hash
                    )
                    for question, outcome in group:
                        if isinstance(outcome, Failure):
                            job.fail(question, outcome, shown)
                    shown.advance(len(group))
