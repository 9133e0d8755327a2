"""What fails in an evaluation is data: scores, summaries, and interfaces that a generator does not accept."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from popi.backends.base import ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult, ignore_result
from popi.data.example import PersonalizationExample
from popi.errors import BackendError
from popi.evaluation.figure import draw_accuracy
from popi.evaluation.folder import Folder
from popi.evaluation.measure import Column
from popi.evaluation.report import markdown
from popi.evaluation.results import Cell, Results
from popi.evaluation.rows import Row, Written, choose
from popi.evaluation.run import evaluate
from popi.evaluation.samples import Sample, from_world
from popi.interface import UserEmbedding
from popi.io import read_jsonl
from popi.prompts import DEFAULT
from popi.registry import generator, inference
from popi.roles import Candidate, Conditioned, ConditionedGenerator, PreferenceInference
from popi.signals import UserSignals
from popi.summary import PreferenceSummary
from popi.testing import ScriptedBackend

Make = Callable[..., PersonalizationExample]
OPEN = DEFAULT.open


async def run(users: list[PersonalizationExample], column: Column, folder: Path, rows: Sequence[Row]) -> Results:
    writer = inference("llm")(column.backend)
    return await evaluate(
        [Sample(0, users)], rows=rows, columns=[column], writer=writer, folder=Folder(folder), judged=10, settings={}
    )


def cell(results: Results, row: str) -> Cell:
    [found] = [cell for cell in results.cells if cell.row == row]
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_scores_that_are_not_finite_are_failed_items_now_and_when_they_are_read_again(
    value: float, make_example: Make, tmp_path: Path
) -> None:
    """Under raw signals all scores of all users are broken, under an empty summary those of one."""

    def score(request: ScoreRequest) -> float:
        content = request.messages[-1].content
        broken = "I am" in content or (OPEN in content and request.response == "good 0")
        return value if broken else -float(len(request.response))

    backend = ScriptedBackend(scores=score)
    column = Column("double", generator("prompted")(backend), backend)
    users = [make_example(f"{n}", (f"good {n}", "bad")) for n in range(4)]
    rows = choose(["no-context", "raw-signals", "empty-summary"])
    results = await run(users, column, tmp_path, rows)
    raw, empty = cell(results, "raw-signals"), cell(results, "empty-summary")
    assert (raw.accuracy, raw.by_seed, raw.differences, raw.unscored) == (None, {}, {}, 4)
    assert (
        raw.unavailable
        == f"none of its 4 pairs could be scored (malformed response: the log-probability is not finite ({value}))"
    )
    assert (empty.accuracy.value, empty.unscored, empty.unavailable) == (0.5, 1, None)
    notes = " ".join(results.notes)
    assert f"Unavailable, because {raw.unavailable}: raw-signals (double)." in notes
    reason = f"malformed response: the log-probability is not finite ({value})"
    assert f"ties: 1 of 4 in empty-summary (double). The first reason: {reason}." in notes
    assert "| raw signals | unavailable |  |" in markdown(results, figure=False)
    draw_accuracy(results, tmp_path / "figure.png")
    backend.dead = "nothing is measured again"
    assert await run(users, column, tmp_path, rows) == results
    for file in tmp_path.rglob("*.jsonl"):
        assert not {"NaN", "Infinity"} & {*re.findall(r"\w+", file.read_text())}
    assert Results.model_validate_json(results.model_dump_json()) == results


async def test_broken_scores_of_the_plain_prompts_leave_no_accuracy(make_example: Make, tmp_path: Path) -> None:
    backend = ScriptedBackend(scores=lambda request: -1.0 if OPEN in request.messages[-1].content else math.nan)
    column = Column("double", generator("prompted")(backend), backend)
    users = [make_example(f"{n}", ("good", "bad")) for n in range(2)]
    results = await run(users, column, tmp_path, choose(["no-context", "empty-summary"]))
    assert [found.accuracy for found in results.cells] == [None, None]
    assert [control.name for control in results.controls] == ["longest-answer"]


async def test_a_generator_that_does_not_accept_an_interface_has_no_cell_of_it(column: Column, tmp_path: Path) -> None:
    class Embed(PreferenceInference):
        name = "embeddings"

        async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
            vectors = ((0.0, 1.0), (1.0, 0.0))
            return [UserEmbedding(user_id=user.user_id, vectors=vectors, model_fingerprint="0") for user in users]  # type: ignore[misc]

    class Reader(ConditionedGenerator):
        """Scores under embeddings; on plain prompts it does what the other generator does."""

        name = "dense"

        async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
            return [ChatResult("- One thing.", "stop") for _ in items]

        def stream(self, item: Conditioned, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
            raise NotImplementedError

        async def score(self, items: Sequence[Candidate]) -> list[ScoreResult]:
            return [ScoreResult(-float(len(item.response)), 1) for item in items]

    dense = ScriptedBackend(model="dense")
    dense.capabilities = replace(dense.capabilities, interfaces=frozenset({"embedding"}))
    embedding = Row("embedding", lambda _: Embed(), "embedding", claims=False)
    rows = [*choose(["no-context", "true-taste-oracle"]), embedding]
    samples = from_world("miniworld", split="unseen-users", users=6, seeds=[0])
    done: list[int] = []
    results = await evaluate(
        samples,
        rows=rows,
        columns=[column, Column("dense", Reader(), dense)],
        writer=inference("llm")(column.backend),
        folder=Folder(tmp_path),
        judged=4,
        settings={},
        advance=done.append,
    )
    found = {(one.row, one.column): one for one in results.cells}
    for row, name, kind in (("true-taste-oracle", "dense", "summary"), ("embedding", "obedient", "embedding")):
        refused = found[row, name]
        assert refused == Cell(row=row, column=name, unavailable=f"{name} does not accept the interface {kind}")
        assert f"Unavailable, because {refused.unavailable}: {row} ({name})." in results.notes
    assert found["embedding", "dense"].accuracy is not None
    assert (found["embedding", "dense"].context_tokens, found["no-context", "dense"].context_tokens) == (2, 0)
    assert found["embedding", "dense"].differences.keys() == {"no-context"}
    assert found["true-taste-oracle", "obedient"].accuracy is not None
    assert sum(done) == 6 * len(rows) * 2
    assert not any("cannot score" in note for note in results.notes)


def column_whose_writer_fails(failure: str) -> Column:
    """Writes no summary of user 1, and prefers short responses under any summary."""

    def answer(request: ChatRequest) -> str | ChatResult:
        if "I am 1" in request.messages[-1].content:
            return ChatResult.failed("too long", failure, model="double")  # type: ignore[arg-type]
        return "- short answers [1]"

    def score(request: ScoreRequest) -> float:
        return -float(len(request.response)) if OPEN in request.messages[-1].content else 0.0

    backend = ScriptedBackend(answer, score)
    return Column("double", generator("prompted")(backend), backend)


@pytest.mark.parametrize("failure", ["request", "malformed", "empty"])
async def test_a_summary_that_failed_is_a_failed_item(failure: str, make_example: Make, tmp_path: Path) -> None:
    column = column_whose_writer_fails(failure)
    users = [make_example(f"{n}", ("So.", "Like this."), ("No.", "Not at all.")) for n in range(4)]
    rows = choose(["no-context", "untrained-summary", "another-users-summary"])
    results = await run(users, column, tmp_path, rows)
    for row in ("untrained-summary", "another-users-summary"):
        found = cell(results, row)
        assert found.accuracy.value == 0.875  # six of eight pairs are won, and two tie
        assert (found.unscored, found.pairs, found.error) == (2, 8, "too long")
        assert (found.context_tokens, found.context_quantiles) == (3, [3] * 5)
    assert [report.failed for report in results.summaries] == [1, 1]
    assert (
        "Users without a summary, because writing it failed: 1 in untrained-summary, 1 in another-users-"
        in " ".join(results.notes)
    )
    kept = [record for _, record in read_jsonl(tmp_path / "users/seed-0/summaries/scripted.jsonl", Written)]
    assert [(one.user_id, one.error) for one in kept if one.summary is None] == [("1", "too long")]
    column.backend.dead = "nothing is written again"  # type: ignore[attr-defined]
    assert await run(users, column, tmp_path, rows) == results


async def test_a_writer_that_is_not_available_ends_the_evaluation(make_example: Make, tmp_path: Path) -> None:
    users = [make_example(f"{n}", ("good", "bad")) for n in range(2)]
    with pytest.raises(BackendError, match="no summary of user '1': too long") as caught:
        await run(users, column_whose_writer_fails("rate_limit"), tmp_path, choose([]))
    assert caught.value.failure == "rate_limit"
    assert not (tmp_path / "users/seed-0/summaries").exists()


async def test_no_summary_at_all_leaves_no_figures(make_example: Make, tmp_path: Path) -> None:
    column = column_whose_writer_fails("request")
    users = [make_example(f"1{n}", ("good", "bad"), tastes={"format": "prose"}) for n in range(2)]
    results = await run(users, column, tmp_path, choose(["untrained-summary", "empty-summary"]))
    untrained = cell(results, "untrained-summary")
    assert untrained.unavailable == "none of its 2 pairs could be scored (too long)"
    assert (untrained.context_tokens, untrained.context_quantiles) == (None, [])
    [report] = results.summaries
    assert (report.failed, report.claims_quantiles, report.truth.recall.value) == (2, [], 0)
    assert (report.truth.precision, set(report.claims.values())) == (None, {0})
    text = markdown(results, figure=False)
    assert "| untrained summary | unavailable |" in text and "percentiles" not in text
