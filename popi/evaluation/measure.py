"""Measuring one cell of the table, user by user."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from popi.backends.base import Backend, ChatResult, FailureKind, ScoreResult
from popi.data.example import PersonalizationExample
from popi.errors import BackendError
from popi.evaluation.judges import Comparison, Judge
from popi.interface import Interface, UserEmbedding
from popi.roles import Candidate, Conditioned, ConditionedGenerator, Failure
from popi.signals import UserId

Failable = Annotated[float, Field(allow_inf_nan=False)] | None
"""A finite number of nats, or ``None`` if a score failed."""

ITEM_FAILURES: frozenset[FailureKind | None] = frozenset({None, "request", "malformed", "empty"})
"""Failures that say something about the generator. Any other one, such as a rate limit, ends the evaluation."""

Context = Interface | Failure | None
"""The interface of a user, the reason why it is missing, or ``None`` for the plain prompt."""


@dataclass(frozen=True, slots=True)
class Column:
    """A generator under test.

    Attributes:
        name: Name in tables.
        generator: Scores and responds.
        backend: The backend of its model.
        reference: The generator whose scores and responses on the plain prompts are the baseline of margins and win
            rates: for a trained generator, the one that it was trained from; ``None`` is the generator itself.
    """

    name: str
    generator: ConditionedGenerator
    backend: Backend
    reference: ConditionedGenerator | None = None


class _Record(BaseModel):
    """The measurements of one user.

    Attributes:
        user_id: The user.
        answer: The response to the first held-out prompt; ``None`` if it was not requested, or failed.
        prompt_tokens: Length of the conversation of that response, including the context of the user.
        completion_tokens: Length of the response.
        error: Why the first of the failed scores or responses failed; empty if none did.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: UserId
    answer: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str = ""


class Plain(_Record):
    """The measurements of a column's reference on the plain prompts of one user.

    Attributes:
        differences: log pi(y_w | x) - log pi(y_l | x) of each held-out pair; empty if the backend does not score.
    """

    differences: tuple[Failable, ...]


class Measured(_Record):
    """The measurements of a generator under a row's interface for one user.

    Attributes:
        margins: h of each held-out pair, in nats; empty if the backend does not score.
        context_tokens: Length of the interface, by the generator's tokenizer; ``None`` if the user has none.
        won: Whether the judge prefers the response to that of the plain prompt: 1, 0, or 1/2 for a tie; ``None`` if the
            user was not judged. A failed response ties.
    """

    margins: tuple[Failable, ...]
    context_tokens: int | None
    won: float | None = None


async def measure_plain(column: Column, examples: Sequence[PersonalizationExample], *, judged: int) -> list[Plain]:
    """Measures every user on the plain prompts. Responses are requested for the first ``judged`` users only."""
    plain: list[None] = [None] * len(examples)
    reference = column.reference or column.generator
    scored = await _differences(column, reference, examples, plain)
    answers = await _answers(reference, examples[:judged], plain[:judged])
    return [
        Plain(user_id=example.user.user_id, differences=tuple(differences), **_fields(_at(answers, place), error))
        for place, (example, (differences, error)) in enumerate(zip(examples, scored, strict=True))
    ]


def measured_as_reference(plain: Sequence[Plain], *, judged: int) -> list[Measured]:
    """The plain prompts of a generator that is its own reference: every margin is zero and every response ties."""
    return [
        Measured(
            **bare.model_dump(exclude={"differences"}),
            margins=tuple(None if difference is None else 0.0 for difference in bare.differences),
            context_tokens=0,
            won=0.5 if place < judged else None,
        )
        for place, bare in enumerate(plain)
    ]


async def measure(
    column: Column,
    examples: Sequence[PersonalizationExample],
    contexts: Sequence[Context],
    plain: Sequence[Plain],
    *,
    judge: Judge | None,
    judged: int,
) -> list[Measured]:
    """Measures every user under a row's interfaces.

    Args:
        column: The generator.
        examples: The users.
        contexts: The context of each user. All items of a user with a ``Failure`` fail.
        plain: The measurements of the column's reference on the plain prompts.
        judge: Compares the responses.
        judged: Number of users, from the first, whose responses are compared. It has no effect without a judge.

    Raises:
        BackendError: If the backend is not available.
    """
    compared = judged if judge else 0
    scored = await _differences(column, column.generator, examples, contexts)
    answers = await _answers(column.generator, examples[:compared], contexts[:compared])
    texts = [answer.text if isinstance(answer, ChatResult) else None for answer in answers]
    won = await _compare(judge, examples[:compared], texts, plain[:compared]) if judge else []
    return [
        Measured(
            user_id=example.user.user_id,
            margins=tuple(map(_minus, differences, plain[place].differences)),
            context_tokens=_context_tokens(column.backend, contexts[place]),
            won=won[place] if place < compared else None,
            **_fields(_at(answers, place), error or plain[place].error),
        )
        for place, (example, (differences, error)) in enumerate(zip(examples, scored, strict=True))
    ]


def _at(answers: Sequence[ChatResult | str], place: int) -> ChatResult | str:
    return answers[place] if place < len(answers) else ""


def _context_tokens(backend: Backend, context: Context) -> int | None:
    if isinstance(context, Failure):
        return None
    if isinstance(context, UserEmbedding):
        return len(context.vectors)
    return 0 if context is None else backend.count_tokens(context.text)


async def _differences(
    column: Column,
    generator: ConditionedGenerator,
    examples: Sequence[PersonalizationExample],
    contexts: Sequence[Context],
) -> list[tuple[list[Failable], str]]:
    """The difference of the two scores of each pair and the first error, by user. One call lets the backend batch."""
    if not column.backend.capabilities.score:
        return [([], "") for _ in examples]
    candidates = [
        Candidate(Conditioned(pair.prompt, context), response)
        for example, context in zip(examples, contexts, strict=True)
        if not isinstance(context, Failure)
        for pair in example.tests
        for response in (pair.chosen, pair.rejected)
    ]
    scores = iter(await generator.score(candidates))
    return [
        ([None] * len(example.tests), context.error)
        if isinstance(context, Failure)
        else _subtract(scores, len(example.tests))
        for example, context in zip(examples, contexts, strict=True)
    ]


def _subtract(scores: Iterator[ScoreResult], pairs: int) -> tuple[list[Failable], str]:
    differences, first = [], ""
    for _ in range(pairs):
        both = next(scores), next(scores)
        errors = [error for score in both if (error := _error(score))]
        differences.append(None if errors else both[0].logprob - both[1].logprob)
        first = first or next(iter(errors), "")
    return differences, first


async def _answers(
    generator: ConditionedGenerator, examples: Sequence[PersonalizationExample], contexts: Sequence[Context]
) -> list[ChatResult | str]:
    """The response to each user's first held-out prompt, or why it failed."""
    items = [
        Conditioned(example.tests[0].prompt, context)
        for example, context in zip(examples, contexts, strict=True)
        if not isinstance(context, Failure)
    ]
    results = iter(await generator.respond(items) if items else ())
    answers: list[ChatResult | str] = []
    for context in contexts:
        if isinstance(context, Failure):
            answers.append(context.error)
        else:
            result = next(results)
            answers.append(_error(result) or result)
    return answers


def _fields(answer: ChatResult | str, error: str) -> dict[str, Any]:
    """The fields of a record that are about its response and its failures."""
    if isinstance(answer, str):
        return {"error": error or answer}
    tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    # No prompt is empty: a server that reports none does not count tokens.
    return {"answer": answer.text, "error": error, **(tokens if answer.prompt_tokens else {})}


def _error(result: ChatResult | ScoreResult) -> str:
    """Why an item failed; empty if it did not.

    Raises:
        BackendError: If the failure says nothing about the generator.
    """
    if result.failure not in ITEM_FAILURES:
        raise BackendError(f"{result.model}: {result.error}", failure=result.failure)
    if result.error is None and isinstance(result, ScoreResult) and not math.isfinite(result.logprob):
        return f"the log-probability is {result.logprob}"
    return "" if result.error is None else result.error or "failed"


async def _compare(
    judge: Judge,
    examples: Sequence[PersonalizationExample],
    answers: Sequence[str | None],
    plain: Sequence[Plain],
) -> list[float]:
    """Has each response judged against that of the plain prompt, in an order that the judge cannot guess."""
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
    """A coin flip for each user, the same in every row."""
    return bool(hashlib.sha256(example.user.user_id.encode("utf-8", "surrogatepass")).digest()[0] & 1)


def _minus(first: Failable, second: Failable) -> Failable:
    return None if first is None or second is None else first - second
