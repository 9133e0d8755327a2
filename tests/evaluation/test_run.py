"""Whole evaluations, in a world whose truth is known and with a model that does what it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from popi.backends.base import ScoreRequest, ScoreResult
from popi.data.example import PersonalizationExample
from popi.errors import BackendError, InputError
from popi.evaluation.figure import draw_accuracy
from popi.evaluation.folder import Folder
from popi.evaluation.measure import Column, Measured
from popi.evaluation.report import markdown
from popi.evaluation.results import Cell, Results
from popi.evaluation.rows import choose
from popi.evaluation.run import evaluate
from popi.evaluation.samples import Sample, from_world
from popi.evaluation.statistics import TIE
from popi.io import read_jsonl
from popi.prompts import DEFAULT
from popi.registry import generator, inference
from popi.testing import ScriptedBackend, tiny_model

Make = Callable[..., PersonalizationExample]
USERS = 20
ROWS = choose([])


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return from_world("miniworld", split="unseen-combinations", users=USERS, seeds=[0, 1])


async def run(samples: list[Sample], column: Column, folder: Path, **options: object) -> Results:
    given = {"rows": ROWS, "judged": 10, "settings": {"world": "miniworld"}, **options}
    writer = inference("llm")(column.backend)
    return await evaluate(samples, columns=[column], writer=writer, folder=Folder(folder), **given)  # type: ignore[arg-type]


def cell(results: Results, row: str) -> Cell:
    [found] = [cell for cell in results.cells if cell.row == row]
    return found


async def test_a_reader_that_obeys_chooses_as_well_as_can_be(
    samples: list[Sample], column: Column, tmp_path: Path
) -> None:
    results = await run(samples, column, tmp_path)
    assert [found.row for found in results.cells] == [row.name for row in ROWS]
    assert results.users == 2 * USERS
    perfect = next(control for control in results.controls if control.name == "perfect-chooser")
    truth = cell(results, "true-taste-oracle")
    assert truth.accuracy == perfect.accuracy
    assert truth.by_seed == perfect.by_seed
    for row in ("no-context", "empty-summary"):
        assert (cell(results, row).accuracy.value, cell(results, row).accuracy.low) == (0.5, 0.5)
    evidence, untrained = cell(results, "evidence-oracle"), cell(results, "untrained-summary")
    assert truth.accuracy.value > evidence.accuracy.value > untrained.accuracy.high
    difference = evidence.accuracy.value - untrained.accuracy.value
    assert evidence.differences["untrained-summary"].value == pytest.approx(difference)
    assert set(untrained.differences) == {"no-context"}
    assert all(found.unscored == 0 for found in results.cells)


async def test_answers_are_judged_by_true_tastes(samples: list[Sample], column: Column, tmp_path: Path) -> None:
    results = await run(samples, column, tmp_path)
    # It always answers in bullets under its own summary, and the bare prompt's answer is the same but for these.
    liked = [example.facts["tastes"].get("format") for sample in samples for example in sample.examples[:10]]
    wins = sum({"bullets": 1.0, "prose": 0.0, None: 0.5}[side] for side in liked)
    untrained = cell(results, "untrained-summary")
    assert untrained.win_rate is not None
    assert untrained.win_rate.value == pytest.approx(wins / 20)
    assert untrained.judged == 20
    assert cell(results, "empty-summary").win_rate == cell(results, "no-context").win_rate


async def test_a_column_of_text_alone_has_win_rates(samples: list[Sample], column: Column, tmp_path: Path) -> None:
    judged = await run(samples, column, tmp_path / "open")
    column.backend.capabilities = replace(column.backend.capabilities, score=False)
    results = await run(samples, column, tmp_path / "black box")
    for row in (row.name for row in ROWS):
        told = cell(results, row)
        assert (told.accuracy, told.pairs, told.unscored) == (None, 0, 0)
        for other, difference in told.differences.items():
            assert difference.value == pytest.approx(told.win_rate.value - cell(results, other).win_rate.value)
        assert told.win_rate == cell(judged, row).win_rate and told.context_tokens == cell(judged, row).context_tokens
    assert {control.name for control in results.controls} == {"longest-answer", "perfect-chooser"}
    assert f"{column.name} cannot score responses: win rates, no accuracy." in results.notes
    report = markdown(results, figure=False)
    assert "| evidence oracle |  | +" in report and "accuracy of a user" not in report
    draw_accuracy(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


async def test_faithfulness_knows_the_oracles(samples: list[Sample], column: Column, tmp_path: Path) -> None:
    reports = {report.row: report for report in (await run(samples, column, tmp_path)).summaries}
    assert set(reports) == {"untrained-summary", "another-users-summary", "evidence-oracle", "true-taste-oracle"}
    for row, to in (("true-taste-oracle", "truth"), ("evidence-oracle", "evidence")):
        found = getattr(reports[row], to)
        assert (found.precision.value, found.recall.value) == (1, 1)
    assert reports["untrained-summary"].claims["unchecked"] == 0.5  # one of its two claims names nothing
    assert reports["untrained-summary"].truth == reports["another-users-summary"].truth  # it tells everybody the same


async def test_bare_prompts_are_scored_once_and_summaries_written_once(
    samples: list[Sample], column: Column, obedient: ScriptedBackend, tmp_path: Path
) -> None:
    done = []
    await run(samples, column, tmp_path, judged=0, advance=done.append)
    users, pairs = 2 * USERS, sum(len(example.tests) for sample in samples for example in sample.examples)
    assert len(obedient.scored) == 2 * pairs * len(ROWS)  # the bare prompts, and every row but the one without context
    assert len(obedient.chats) == users
    assert sum(done) == users * len(ROWS)


async def test_an_interrupted_evaluation_goes_on(
    samples: list[Sample], column: Column, obedient: ScriptedBackend, tmp_path: Path
) -> None:
    straight = await run(samples, column, tmp_path / "straight")

    def die_after_three_rows(users: int) -> None:
        rows.append(users)
        if len(rows) == 3:
            obedient.dead = "out of memory"

    rows: list[int] = []
    with pytest.raises(BackendError, match="out of memory"):
        await run(samples, column, tmp_path / "resumed", advance=die_after_three_rows)
    obedient.dead = None
    obedient.scored.clear()
    obedient.chats.clear()
    assert await run(samples, column, tmp_path / "resumed") == straight
    tests = len(samples[0].examples[0].tests)
    assert len(obedient.scored) == 2 * USERS * tests * (4 + len(ROWS))  # four rows of one sample and all of the other
    written = ["Signals of one user" in request.messages[-1].content for request in obedient.chats]
    assert sum(written) == USERS  # the summaries of the first sample were there
    obedient.dead = "nobody is to ask"
    assert await run(samples, column, tmp_path / "resumed") == straight


async def test_rows_that_the_data_cannot_have_are_named(
    column: Column, tmp_path: Path, make_example: Callable[..., PersonalizationExample]
) -> None:
    users = [make_example(name, ("- One thing.", "One thing.")) for name in ("ann", "bob")]
    done: list[int] = []
    results = await run([Sample(0, users)], column, tmp_path, advance=done.append)
    assert sum(done) == len(users) * len(ROWS)
    assert results.left_out == {
        "evidence-oracle": "2 of 2 users have no evidence oracle",
        "true-taste-oracle": "2 of 2 users have no truth oracle",
    }
    assert cell(results, "untrained-summary").accuracy.value == 1
    assert all(found.win_rate is None for found in results.cells)
    assert all(report.truth is None for report in results.summaries)
    assert any("no win rate" in note for note in results.notes)


async def test_a_row_and_a_seed_can_be_added(samples: list[Sample], column: Column, tmp_path: Path) -> None:
    await run(samples[:1], column, tmp_path, rows=choose(["no-context", "raw-signals"]))
    both = await run(samples, column, tmp_path)
    assert both == await run(samples, column, tmp_path / "straight")


async def test_a_transformer_is_measured_like_the_double(samples: list[Sample], tmp_path: Path) -> None:
    from popi.backends.transformers import TransformersBackend

    backend = TransformersBackend.from_model(*tiny_model(), name="tiny")
    users = Sample(0, samples[0].examples[:3])
    rows = choose(["no-context", "true-taste-oracle"])
    results = await run([users], Column("tiny", generator("prompted")(backend), backend), tmp_path, rows=rows, judged=0)
    assert [found.unscored for found in results.cells] == [0, 0]
    example = users.examples[1]
    pair, told = example.tests[0], example.oracles["truth"]
    chosen, rejected, plain_chosen, plain_rejected = await backend.score(
        [
            ScoreRequest(DEFAULT.answer_messages(pair.prompt, context), response)
            for context in (told, None)
            for response in (pair.chosen, pair.rejected)
        ]
    )
    measured = [record for _, record in read_jsonl(tmp_path / "users/seed-0/tiny/true-taste-oracle.jsonl", Measured)]
    by_hand = (chosen.logprob - rejected.logprob) - (plain_chosen.logprob - plain_rejected.logprob)
    assert measured[1].margins[0] == pytest.approx(by_hand, abs=TIE)
    await backend.close()


async def test_where_no_row_can_be_had_that_is_the_error(column: Column, make_example: Make, tmp_path: Path) -> None:
    sample = Sample(0, [make_example(name, ("good", "bad")) for name in ("ann", "bob")])
    with pytest.raises(
        InputError, match=r"none of the rows .* \(evidence-oracle: 2 of 2 users have no evidence oracle\)"
    ):
        await run([sample], column, tmp_path, rows=choose(["evidence-oracle"]))


async def test_clusters_and_pairs_without_a_score_are_told(make_example: Make, tmp_path: Path) -> None:
    def score(request: ScoreRequest) -> ScoreResult:
        if "I am 1" in request.messages[-1].content:
            return ScoreResult.failed("too long", "request", model="double")
        return ScoreResult(-1.0, 1)

    backend = ScriptedBackend(scores=score)
    column = Column("double", generator("prompted")(backend), backend)
    users = [make_example(f"{n}", ("good", "bad")) for n in range(4)]
    users = [one.model_copy(update={"facts": {"cluster": place // 2}}) for place, one in enumerate(users)]
    results = await run([Sample(0, users)], column, tmp_path, rows=choose(["raw-signals", "empty-summary"]))
    notes = " ".join(results.notes)
    assert "count as ties: 1 of 4 in raw-signals (double). The first reason: too long." in notes
    assert "they form 2 clusters" in notes


async def test_a_trained_generator_is_compared_with_what_it_was(
    column: Column, make_example: Make, tmp_path: Path
) -> None:
    trained = ScriptedBackend(
        lambda request: "- One thing.", lambda request: 3.0 if request.response == "good" else 1.0, model="trained"
    )
    unpersonalized = Column("trained", generator("prompted")(trained), trained, column.generator)
    users = [make_example(f"{n}", ("good", "bad"), tastes={"format": "bullets"}) for n in range(4)]
    rows = choose(["no-context", "empty-summary"])
    results = await run([Sample(0, users)], unpersonalized, tmp_path, rows=rows, judged=4)
    bare = cell(results, "no-context")
    assert bare.accuracy.value == 1
    assert bare.context_tokens == 0
    assert bare.win_rate is not None
    assert bare.win_rate.value == 1  # bullets against the reference's prose
    assert not any("by construction" in note for note in results.notes)


async def test_a_trained_writer_stands_beside_what_it_was(
    samples: list[Sample], column: Column, tmp_path: Path
) -> None:
    good = ScriptedBackend(lambda request: "- bullet points", model="good")
    writers = {"writer": inference("llm")(good), "untrained": inference("llm")(column.backend)}
    rows = choose(["untrained-summary", "popi-summary", "another-users-summary"], trained=True)
    results = await evaluate(
        samples, rows=rows, columns=[column], folder=Folder(tmp_path), judged=0, settings={}, **writers
    )
    reports = {report.row: report for report in results.summaries}
    assert reports["popi-summary"].claims_quantiles[0] == 1
    assert reports["untrained-summary"].claims_quantiles[0] == 2
    assert reports["another-users-summary"].claims_quantiles[0] == 1
    assert "untrained-summary" in cell(results, "popi-summary").differences
