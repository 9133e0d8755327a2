"""Many answers, for ``popi generate``: one a line of prompts, never twice."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from popi import registry
from popi.backends.base import FinishReason
from popi.cli.batches import (
    Outcome,
    accounted,
    affordable,
    append_batches,
    check_settings,
    closing,
    identity,
    keep_settings,
    load_backend,
    telling,
)
from popi.cli.growing import GrowingFile
from popi.cli.output import note, print_records, progress
from popi.cli.summaries import read_summaries
from popi.errors import InputError, PopiError, did_you_mean
from popi.io import as_line, check_rereadable, read_jsonl
from popi.prompts import DEFAULT
from popi.roles import Conditioned, ConditionedGenerator
from popi.signals import Text
from popi.summary import PreferenceSummary


class PromptLine(BaseModel):
    """One line of prompts; without a user it is answered bare."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: Text | None = None
    prompt: Text


class Answer(BaseModel):
    """One line of answers.

    Attributes:
        line: The line of the prompt.
        user_id: The user.
        prompt: What was asked.
        response: What was answered.
        finish_reason: ``length`` when it was cut.
        prompt_tokens: Length of the rendered conversation.
        completion_tokens: Length of the answer.
        model: The model that served it.
        route: By which of several backends, where there was a choice.
        asked: Fingerprint of user, prompt and summary.
        template_hash: ``prompts.template_hash()`` at the time.
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
    asked: str
    template_hash: str


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt on its way to the generator, and whether it was answered before."""

    line: int
    user_id: str | None
    item: Conditioned
    answered: bool = False

    def fingerprint(self) -> str:
        """Changes with the user, the prompt and the summary; 16 hex digits."""
        parts = (
            self.user_id,
            self.item.prompt,
            self.item.interface.text if isinstance(self.item.interface, PreferenceSummary) else None,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_summaries(path: Path) -> dict[str, PreferenceSummary]:
    """The summary of each user, without its claims: a generator reads the text.

    Raises:
        InputError: As :func:`read_summaries`.
    """
    return {summary.user_id: summary.model_copy(update={"claims": ()}) for _, summary in read_summaries(path)}


def answer_all(
    prompts: Path,
    out: Path,
    model: str,
    options: dict[str, int | float],
    *,
    summaries: Path | None,
    batch_size: int,
    json: bool,
) -> None:
    """Answers the prompts that have no answer in ``out``; without ``summaries`` all of them bare.

    Raises:
        InputError: If what is read is broken or does not fit what was answered before.
        PopiError: If some prompts have no answer in the end.
    """
    check_rereadable(prompts)
    known = None if summaries is None else load_summaries(summaries)
    settings = {"model": identity(model), **options, "template_hash": DEFAULT.hash}
    with GrowingFile(out) as lines:
        if lines.repaired:
            note(f"{out} ended in half a line, which was dropped")
        before = {answer.line: answer.asked for _, answer in read_jsonl(out, Answer)} if out.exists() else {}
        total = pending = 0
        for question in _questions(prompts, known, before):
            total += 1
            pending += not question.answered
        check_settings(out, settings)
        written = failed = 0
        if pending:
            with telling(f"what is finished is kept in {out}, and the same command goes on"):
                backend, ledger = load_backend(model, "generator")
                answering = registry.generator("prompted")(backend, **options)
                keep_settings(out, settings)
                rest = (question for question in _questions(prompts, known, before) if not question.answered)
                work = _work(answering, affordable(rest, ledger), lines, pending, batch_size)
                with accounted(ledger):
                    written, failed = asyncio.run(closing(backend, work))
    record = {"prompts": total, "already done": total - pending, "written": written, "failed": failed, "out": out}
    print_records([record], json_flag=json)
    if failed:
        raise PopiError(f"{failed} of {total} prompts have no answer; the same command tries them again")


def _questions(prompts: Path, known: dict[str, PreferenceSummary] | None, before: dict[int, str]) -> Iterator[Question]:
    for number, line in read_jsonl(prompts, PromptLine):
        summary = None
        if known is not None and line.user_id is not None:
            summary = known.get(line.user_id)
            if summary is None:
                raise InputError(
                    f"there is no summary of user {line.user_id!r}",
                    file=prompts,
                    line=number,
                    field="user_id",
                    fix=did_you_mean(line.user_id, known),
                )
        question = Question(number, line.user_id, Conditioned(line.prompt, summary), number in before)
        if question.answered and before[number] != question.fingerprint():
            raise InputError(
                "the prompt or the summary has changed since it was answered",
                file=prompts,
                line=number,
                fix="give another --out",
            )
        yield question


async def _work(
    answering: ConditionedGenerator,
    questions: Iterator[Question],
    lines: GrowingFile,
    pending: int,
    batch_size: int,
) -> tuple[int, int]:
    async def answer(batch: list[Question]) -> list[Outcome]:
        results = await answering.respond([question.item for question in batch])
        outcomes: list[Outcome] = []
        for question, result in zip(batch, results, strict=True):
            if result.error is not None:
                outcomes.append(Outcome(error=f"no answer to line {question.line}: {result.error}"))
                continue
            answer = Answer(
                line=question.line,
                user_id=question.user_id,
                prompt=question.item.prompt,
                response=result.text,
                finish_reason=result.finish_reason,
                prompt_tokens=result.prompt_tokens,
                completion_tokens=result.completion_tokens,
                model=result.model,
                route=result.route,
                asked=question.fingerprint(),
                template_hash=DEFAULT.hash,
            )
            outcomes.append(Outcome(as_line(answer)))
        return outcomes

    with progress("answers", pending) as shown:
        return await append_batches(questions, answer, lines, shown, batch_size)
