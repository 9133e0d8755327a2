"""Tables for people, and the figure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from popi.errors import MissingExtra, PopiError
from popi.evaluation.figure import draw_accuracy
from popi.evaluation.report import markdown, remarks, tables
from popi.evaluation.results import Cell, Control, Faithfulness, Results, SummaryReport
from popi.evaluation.statistics import Estimate


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.02, high=value + 0.03)


def cell(row: str, column: str, accuracy: float) -> Cell:
    return Cell(
        row=row,
        column=column,
        accuracy=estimate(accuracy),
        by_seed={0: accuracy},
        differences={} if row == "untrained-summary" else {"untrained-summary": estimate(accuracy - 0.6)},
        win_rate=None if column == "stranger" else estimate(0.5),
        judged=0,
        context_tokens=12.34,
        prompt_tokens=40.0,
        completion_tokens=9.5,
        context_quantiles=[1, 2, 3, 4, 5],
        accuracy_quantiles=[0, 0.25, 0.5, 0.75, 1],
        pairs=4,
        unscored=0,
    )


RESULTS = Results(
    settings={"world": "miniworld", "split": "unseen-users", "nothing": None},
    users=7,
    cells=[
        cell(row, column, accuracy)
        for row, accuracy in (("untrained-summary", 0.6), ("evidence-oracle", 0.812))
        for column in ("base", "stranger")
    ],
    controls=[
        Control(name="perfect-chooser", column=None, accuracy=estimate(0.95), by_seed={0: 0.95}),
        Control(name="plain-likelihood", column="base", accuracy=estimate(0.51), by_seed={0: 0.51}),
    ],
    summaries=[
        SummaryReport(
            row="untrained-summary",
            truth=Faithfulness(precision=estimate(0.3), recall=None),
            evidence=None,
            not_enough_evidence=0.125,
            claims={"true": 0.3, "opposite": 0.7},
            claims_quantiles=[0, 1, 2, 3, 4],
            precision_quantiles=[],
        )
    ],
    left_out={"true-taste-oracle": "2 of 7 users have no truth oracle"},
    notes=["It is a miniature."],
)


def test_one_table_a_generator_then_the_summaries() -> None:
    first, second, faithfulness, claims, spread = tables(RESULTS)
    assert first.title.startswith("base: ")
    assert list(spread.records[0])[1:3] == ["5th", "25th"]
    assert first.records[1] == {
        "row": "evidence oracle",
        "accuracy": "81.2 [79.2, 84.2]",
        "minus untrained summary": "+21.2 [+19.2, +24.2]",
        "win rate": "50.0 [48.0, 53.0]",
        "context tokens": "12.3",
    }
    assert [record["row"] for record in first.records[2:]] == ["(perfect chooser)", "(plain likelihood)"]
    assert [record["row"] for record in second.records[2:]] == ["(perfect chooser)"]
    assert second.records[0]["win rate"] == ""
    assert faithfulness.records[0]["precision (truth)"] == "30.0 [28.0, 33.0]"
    assert faithfulness.records[0]["recall (truth)"] == ""
    assert claims.records[0] == {"row": "untrained summary", "true": "30.0", "opposite": "70.0"}
    assert [record["median"] for record in spread.records] == ["2", "3", "50", "3", "50"]


def test_a_terminal_has_no_room_for_both_ends_of_an_interval() -> None:
    record = next(tables(RESULTS, narrow=True)).records[1]
    assert (record["accuracy"], record["minus untrained summary"]) == ("81.2 ±2.5", "+21.2 ±2.5")


@pytest.mark.parametrize("table", list(tables(RESULTS)), ids=lambda table: table.title)
def test_every_line_of_a_table_has_the_same_columns(table: object) -> None:
    heads = {tuple(record) for record in table.records}  # type: ignore[attr-defined]
    assert len(heads) == 1


def test_what_has_to_be_said_is_said() -> None:
    said = ["It is a miniature.", "true taste oracle is left out: 2 of 7 users have no truth oracle."]
    assert remarks(RESULTS) == said
    text = markdown(RESULTS, figure=False)
    assert all(f"> {remark}" in text for remark in said)
    assert "7 users. Settings: world miniworld, split unseen-users." in text
    assert "| evidence oracle | 81.2 [79.2, 84.2] |" in text
    assert ".png" not in text
    assert "](accuracy_vs_context.png)" in markdown(RESULTS, figure=True)


def test_results_survive_json() -> None:
    assert Results.model_validate_json(RESULTS.model_dump_json()) == RESULTS


def test_the_figure_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs the extra bench")
    path = tmp_path / "figure.png"
    draw_accuracy(RESULTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs the extra bench")
    (tmp_path / "file").write_text("")
    with pytest.raises(PopiError, match="cannot write"):
        draw_accuracy(RESULTS, tmp_path / "file" / "figure.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(MissingExtra, match=r"popi\[bench\]"):
        draw_accuracy(RESULTS, tmp_path / "figure.png")
