"""Margins, context lengths and judged answers of single users."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from pydantic import ValidationError

from popi.backends.base import ChatRequest, ChatResult, ScoreRequest, ScoreResult
from popi.data.example import PersonalizationExample
from popi.errors import BackendError
from popi.evaluation.judges import Comparison
from popi.evaluation.measure import Column, Measured, Plain, measure, measure_plain, measured_as_reference
from popi.prompts import DEFAULT
from popi.registry import generator
from popi.roles import Failure
from popi.summary import Author, PreferenceSummary, Provenance
from popi.testing import ScriptedBackend

Make = Callable[..., PersonalizationExample]
PAIR = "good", "bad"


def summary_of(example: PersonalizationExample, text: str = "- short answers") -> PreferenceSummary:
    return PreferenceSummary(
        user_id=example.user.user_id, text=text, provenance=Provenance(author=Author.INFERRED, model="by hand")
    )


def column_of(backend: ScriptedBackend) -> Column:
    return Column(backend.model, generator("prompted")(backend), backend)


class PrefersFirst:
    """A judge with a strong bias to what stands first, which remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Comparison] = []

    async def compare(self, items: Sequence[Comparison]) -> list[float]:
        self.seen.extend(items)
        return [1.0] * len(items)


async def test_the_margin_is_the_conditioned_difference_minus_the_bare_one(make_example: Make) -> None:
    nats = {("bare", "good"): -10.0, ("bare", "bad"): -7.0, ("told", "good"): -5.5, ("told", "bad"): -6.0}

    def score(request: ScoreRequest) -> float:
        return nats["told" if DEFAULT.open in request.messages[-1].content else "bare", request.response]

    column = column_of(ScriptedBackend(scores=score))
    ann = make_example("ann", ("good", "bad"))
    plain = await measure_plain(column, [ann], judged=0)
    assert plain == [Plain(user_id="ann", differences=(-3.0,))]
    [measured] = await measure(column, [ann], [summary_of(ann)], plain, judge=None, judged=5)
    assert measured.margins == (3.5,)  # (-5.5 + 6) - (-10 + 7)
    assert measured.context_tokens == 3  # the scripted backend counts words
    assert (measured.answer, measured.won) == (None, None)


async def test_all_pairs_of_all_users_are_scored_in_one_call(make_example: Make) -> None:
    backend = ScriptedBackend()
    users = [make_example("ann", ("a", "b"), ("c", "d")), make_example("bob", ("e", "f"))]
    plain = await measure_plain(column_of(backend), users, judged=0)
    assert [request.response for request in backend.scored] == ["a", "b", "c", "d", "e", "f"]
    assert [len(record.differences) for record in plain] == [2, 1]


async def test_a_failed_score_is_no_margin_and_spoils_no_other(make_example: Make) -> None:
    def score(request: ScoreRequest) -> float | ScoreResult:
        return ScoreResult.failed("too long", "request", model="m") if request.response == "bad" else -1.0

    column = column_of(ScriptedBackend(scores=score))
    ann = make_example("ann", ("good", "bad"), ("fine", "poor"))
    plain = await measure_plain(column, [ann], judged=0)
    assert plain[0].differences == (None, 0.0)
    [measured] = await measure(column, [ann], [summary_of(ann)], plain, judge=None, judged=0)
    assert (measured.margins, measured.error) == ((None, 0.0), "too long")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_a_score_that_is_not_finite_is_a_failed_one(value: float, make_example: Make) -> None:
    column = column_of(ScriptedBackend(scores=lambda request: value if request.response == "bad" else -1.0))
    [plain] = await measure_plain(column, [make_example("ann", PAIR, ("fine", "poor"))], judged=0)
    assert plain == Plain(
        user_id="ann", differences=(None, 0.0), error=f"malformed response: the log-probability is not finite ({value})"
    )
    assert Plain.model_validate_json(plain.model_dump_json()) == plain
    [bare] = measured_as_reference([plain], judged=0)
    assert bare.margins == (None, 0.0)
    with pytest.raises(ValidationError, match="finite number"):
        Plain(user_id="ann", differences=(value,))


async def test_a_user_without_a_summary_is_failed_and_spoils_no_other(make_example: Make) -> None:
    column = column_of(ScriptedBackend(lambda _: "an answer"))
    users = [make_example(name, PAIR, ("fine", "poor")) for name in ("ann", "bob", "cho")]
    plain = await measure_plain(column, users, judged=3)
    told = [summary_of(users[0]), Failure("bob", "it echoes"), None]
    ann, bob, cho = await measure(column, users, told, plain, judge=PrefersFirst(), judged=3)
    failed = {"answer": None, "prompt_tokens": None, "completion_tokens": None, "error": "it echoes", "won": 0.5}
    assert bob == Measured(user_id="bob", margins=(None, None), context_tokens=None, **failed)
    for one, tokens in ((ann, 3), (cho, 0)):
        assert (one.margins, one.answer, one.context_tokens, one.error) == ((0.0, 0.0), "an answer", tokens, "")


@pytest.mark.parametrize("failure", ["unreachable", "budget", "rate_limit"])
async def test_a_failure_that_says_nothing_of_the_generator_ends_the_work(failure: str, make_example: Make) -> None:
    lost = ScoreResult.failed("not now", failure, model="far")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="far: not now"):
        await measure_plain(column_of(ScriptedBackend(scores=lambda _: lost)), [make_example("ann", PAIR)], judged=0)
    silent = ChatResult.failed("not now", failure, model="far")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="far: not now"):
        await measure_plain(column_of(ScriptedBackend(lambda _: silent)), [make_example("ann", PAIR)], judged=1)


async def test_a_backend_without_log_probabilities_has_answers_and_no_margins(make_example: Make) -> None:
    backend = ScriptedBackend(lambda _: "an answer")
    backend.capabilities = replace(backend.capabilities, score=False)
    ann = make_example("ann", PAIR)
    plain = await measure_plain(column_of(backend), [ann], judged=1)
    answered = {"answer": "an answer", "prompt_tokens": 2, "completion_tokens": 2}
    assert plain == [Plain(user_id="ann", differences=(), **answered)]
    [measured] = await measure(column_of(backend), [ann], [summary_of(ann)], plain, judge=PrefersFirst(), judged=1)
    assert measured.margins == () and measured.won is not None and backend.scored == []
    [bare] = measured_as_reference(plain, judged=1)
    assert bare == Measured(user_id="ann", margins=(), context_tokens=0, won=0.5, **answered)
    assert measured.prompt_tokens > 2 and measured.completion_tokens == 2


async def test_a_server_that_counts_no_tokens_says_nothing_of_costs(make_example: Make) -> None:
    column = column_of(ScriptedBackend(lambda _: ChatResult("an answer", "stop", completion_tokens=2)))
    [plain] = await measure_plain(column, [make_example("ann", PAIR)], judged=1)
    assert (plain.answer, plain.prompt_tokens, plain.completion_tokens) == ("an answer", None, None)


async def test_the_order_of_answers_is_random_and_undone(make_example: Make) -> None:
    judge = PrefersFirst()
    users = [make_example(f"user {place}", ("good", "bad")) for place in range(100)]
    column = column_of(
        ScriptedBackend(lambda request: "told" if DEFAULT.open in request.messages[-1].content else "bare")
    )
    plain = await measure_plain(column, users, judged=80)
    told = [summary_of(user) for user in users]
    measured = await measure(column, users, told, plain, judge=judge, judged=80)
    assert [record.answer for record in measured] == ["told"] * 80 + [None] * 20
    assert [record.won is None for record in measured] == [False] * 80 + [True] * 20
    won = [record.won for record in measured[:80]]
    assert won == [float(item.first == "told") for item in judge.seen]
    assert 25 <= sum(first == 1 for first in won) <= 55


async def test_an_answer_that_failed_ties(make_example: Make) -> None:
    def answer(request: ChatRequest) -> str | ChatResult:
        return ChatResult("", "error", error="filtered") if DEFAULT.open in request.messages[-1].content else "fine"

    ann = make_example("ann", ("good", "bad"))
    column = column_of(ScriptedBackend(answer))
    plain = await measure_plain(column, [ann], judged=1)
    [measured] = await measure(column, [ann], [summary_of(ann)], plain, judge=PrefersFirst(), judged=1)
    assert (measured.answer, measured.won) == (None, 0.5)


@pytest.mark.parametrize("judged", [0, 1, 2])
async def test_without_context_every_pair_and_every_answer_ties(judged: int, make_example: Make) -> None:
    users = [make_example("ann", ("good", "bad")), make_example("bob", ("a", "b"), ("c", "d"))]
    plain = await measure_plain(column_of(ScriptedBackend()), users, judged=judged)
    measured = measured_as_reference(plain, judged=judged)
    assert [record.margins for record in measured] == [(0.0,), (0.0, 0.0)]
    assert [record.won for record in measured] == [0.5] * judged + [None] * (2 - judged)
    assert {record.context_tokens for record in measured} == {0}
