"""Measuring one cell of the table, user by user."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from popi.backends.base import Backend, ChatResult, ScoreResult
from popi.data.example import PersonalizationExample
from popi.errors import BackendError
from popi.evaluation.judges import Comparison, Judge
from popi.roles import Candidate, Conditioned, ConditionedGenerator
from popi.summary import PreferenceSummary

Failable = float | None
"""A figure in nats, or ``None`` where a score failed."""


@dataclass(frozen=True, slots=True)
class Column:
    """A generator under test.

    Attributes:
        name: Names it in tables.
        generator: Scores and answers.
        backend: The model behind it.
        reference: The generator whose answers to the bare prompts the margins and the judge compare with: of one that
            was trained, what it was before; ``None`` is the generator itself.
    """

    name: str
    generator: ConditionedGenerator
    backend: Backend
    reference: ConditionedGenerator | None = None


class _Record(BaseModel):
    """What is kept of a user.

    Attributes:
        user_id: The user.
        answer: The answer to the first test prompt; ``None`` when it was not asked, or failed.
        prompt_tokens: That were read for that answer, what was told of the user included.
        completion_tokens: That were written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: str
    answer: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Plain(_Record):
    """What a column's reference does for a user on the bare prompts.

    Attributes:
        differences: log pi(y_w | x) - log pi(y_l | x) of each test pair; none from a backend without log-probabilities.
    """

    differences: tuple[Failable, ...]


class Measured(_Record):
    """What a generator does for a user under a row's summary.

    Attributes:
        margins: h of each test pair; none from a backend without log-probabilities.
        context_tokens: Length of what it was told of the user, by its own tokenizer.
        won: Whether the judge prefers the answer to the bare prompt's: 1, 0, or 1/2 for a tie; ``None`` for a user
            who was not judged. A failed answer ties.
    """

    margins: tuple[Failable, ...]
    context_tokens: int
    won: float | None = None


async def measure_plain(column: Column, examples: Sequence[PersonalizationExample], *, judged: int) -> list[Plain]:
    """Measures every user on the bare prompts; the first ``judged`` of them get an answer too."""
    nothing = [None] * len(examples)
    reference = column.reference or column.generator
    differences = await _differences(column, reference, examples, nothing)
    answers = await _answers(reference, examples[:judged], nothing[:judged])
    answers += nothing[judged:]
    return [
        Plain(user_id=example.user.user_id, differences=tuple(found), **_kept(answer))
        for example, found, answer in zip(examples, differences, answers, strict=True)
    ]


def measure_nothing(plain: Sequence[Plain], *, judged: int) -> list[Measured]:
    """The bare prompt of a generator that is its own reference: every margin is zero and every answer ties."""
    return [
        Measured(
            **bare.model_dump(exclude={"differences"}),
            margins=(0.0,) * len(bare.differences),
            context_tokens=0,
            won=0.5 if place < judged else None,
        )
        for place, bare in enumerate(plain)
    ]


async def measure(
    column: Column,
    examples: Sequence[PersonalizationExample],
    summaries: Sequence[PreferenceSummary | None],
    plain: Sequence[Plain],
    *,
    judge: Judge | None,
    judged: int,
) -> list[Measured]:
    """Measures every user under a row's summaries.

    Args:
        column: The generator.
        examples: The users.
        summaries: One for each user; ``None`` is the bare prompt.
        plain: What the column's reference does for them on the bare prompts.
        judge: Compares the answers.
        judged: How many of the first users get an answer that is compared; none without a judge.
    """
    asked = judged if judge else 0
    differences = await _differences(column, column.generator, examples, summaries)
    answers = await _answers(column.generator, examples[:asked], summaries[:asked])
    texts = [None if answer is None else answer.text for answer in answers]
    won = await _compare(judge, examples[:asked], texts, plain[:asked]) if judge else []
    return [
        Measured(
            user_id=example.user.user_id,
            margins=tuple(map(_minus, differences[place], plain[place].differences)),
            context_tokens=0 if told is None else column.backend.count_tokens(told.text),
            won=won[place] if place < asked else None,
            **_kept(answers[place] if place < asked else None),
        )
        for place, (example, told) in enumerate(zip(examples, summaries, strict=True))
    ]


async def _differences(
    column: Column,
    generator: ConditionedGenerator,
    examples: Sequence[PersonalizationExample],
    summaries: Sequence[PreferenceSummary | None],
) -> list[list[Failable]]:
    """What sets the two answers of every pair apart, all asked in one call so that the backend can batch."""
    if not column.backend.capabilities.score:
        return [[] for _ in examples]
    candidates = [
        Candidate(Conditioned(pair.prompt, summary), response)
        for example, summary in zip(examples, summaries, strict=True)
        for pair in example.tests
        for response in (pair.chosen, pair.rejected)
    ]
    scores = iter([None if _failed(score) else score.logprob for score in await generator.score(candidates)])
    return [[_minus(next(scores), next(scores)) for _ in example.tests] for example in examples]


async def _answers(
    generator: ConditionedGenerator,
    examples: Sequence[PersonalizationExample],
    summaries: Sequence[PreferenceSummary | None],
) -> list[ChatResult | None]:
    """The answer to each user's first test prompt; ``None`` where it failed."""
    if not examples:
        return []
    asked = [
        Conditioned(example.tests[0].prompt, summary) for example, summary in zip(examples, summaries, strict=True)
    ]
    return [None if _failed(result) else result for result in await generator.respond(asked)]


def _kept(answer: ChatResult | None) -> dict[str, Any]:
    """The fields of a record that are of an answer."""
    if answer is None:
        return {}
    if not answer.prompt_tokens:  # no prompt is empty: this server counts none
        return {"answer": answer.text}
    return {
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }


def _failed(result: ChatResult | ScoreResult) -> bool:
    """Whether an item failed by itself; a limit, a broken line or an empty purse is no property of a generator.

    Raises:
        BackendError: If it is one of these.
    """
    if result.failure not in (None, "request"):
        raise BackendError(f"{result.model}: {result.error}", failure=result.failure)
    return result.error is not None


async def _compare(
    judge: Judge,
    examples: Sequence[PersonalizationExample],
    answers: Sequence[str | None],
    plain: Sequence[Plain],
) -> list[float]:
    """Has each answer judged against the bare prompt's, in an order that a judge cannot guess."""
    items: dict[int, Comparison] = {}
    for place, (example, answer, bare) in enumerate(zip(examples, answers, plain, strict=True)):
        if answer is not None and bare.answer is not None:
            first, second = (bare.answer, answer) if _swapped(example) else (answer, bare.answer)
            items[place] = Comparison(example, example.tests[0].prompt, first, second)
    won = [0.5] * len(examples)
    for place, score in zip(items, await judge.compare(list(items.values())), strict=True):
        won[place] = 1 - score if _swapped(examples[place]) else score
    return won


def _swapped(example: PersonalizationExample) -> bool:
    """A coin for each user, which falls the same in every row."""
    return bool(hashlib.sha256(example.user.user_id.encode("utf-8", "surrogatepass")).digest()[0] & 1)


def _minus(first: Failable, second: Failable) -> Failable:
    return None if first is None or second is None else first - second
