"""Figures from what was measured, worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.evaluation.measure import Measured, Plain
from popi.evaluation.results import Cell
from popi.evaluation.tabulate import MeasuredUser, Tabulator
from popi.signals import UserSignals
from popi.summary import Author, Claim, PreferenceSummary, Provenance, summarize_claims

PAIR = HeldOutPair(prompt="Why?", chosen="Because it is so.", rejected="So.")


def user(
    name: str,
    margins: Mapping[str, tuple[float | None, ...]],
    *,
    seed: int = 0,
    won: float | None = None,
    tokens: int = 5,
    read: int | None = None,
) -> MeasuredUser:
    pairs = len(next(iter(margins.values())))
    example = PersonalizationExample(user=UserSignals(user_id=name), tests=(PAIR,) * pairs)
    cells = {
        (row, "model"): Measured(
            user_id=name, margins=found, context_tokens=tokens, won=won, prompt_tokens=read, completion_tokens=read
        )
        for row, found in margins.items()
    }
    plain = {"model": Plain(user_id=name, differences=(-1.0,) * pairs)}
    return MeasuredUser(seed, example, plain=plain, cells=cells)


FOUR = [
    user("ann", {"told": (2.0,), "other": (1.0,)}, won=1.0, tokens=10, read=30),
    user("bob", {"told": (-1.0,), "other": (-1.0,)}, won=0.5, tokens=20, read=41),
    user("cho", {"told": (0.0,), "other": (-3.0,)}, seed=1, tokens=30),
    user("dee", {"told": (None,), "other": (-3.0,)}, seed=1, tokens=0),
]


def test_a_cell() -> None:
    [cell] = Tabulator(FOUR).cells(["told"], ["model"], ["other"])
    assert cell.accuracy.value == 0.5  # (1 + 0 + 1/2 + 1/2) / 4
    assert cell.by_seed == {0: 0.5, 1: 0.5}
    assert cell.differences == {}  # the reference is not in the table
    assert cell.win_rate is not None
    assert (cell.win_rate.value, cell.judged) == (0.75, 2)
    assert (cell.context_tokens, cell.pairs, cell.unscored) == (15, 4, 1)
    assert (cell.prompt_tokens, cell.completion_tokens) == (35.5, 35.5)  # of the two that were judged


def test_differences_are_paired_and_told_from_the_references_that_are_there() -> None:
    told, other = Tabulator(FOUR).cells(["told", "other"], ["model"], ["other", "absent"])
    assert told.differences["other"].value == 0.25  # .5 - .25
    assert other.differences == {}
    steps = [user(str(place), {"told": (1.0, 1.0), "other": (1.0, -1.0)}) for place in range(5)]
    [difference] = [
        cell.differences["other"] for cell in Tabulator(steps).cells(["told", "other"], ["model"], ["other"])[:1]
    ]
    assert (difference.low, difference.value, difference.high) == (0.5, 0.5, 0.5)


def test_where_there_is_text_alone_win_rates_are_compared() -> None:
    users = [user(str(place), {"told": (), "other": ()}, won=1.0) for place in range(4)]
    for place, each in enumerate(users):
        each.example = FOUR[0].example.model_copy(update={"user": UserSignals(user_id=str(place))})
        won = 0.5 if place < 3 else None
        each.cells["other", "model"] = Measured(user_id=str(place), margins=(), context_tokens=0, won=won)
        each.cells["told", "model"] = Measured(user_id=str(place), margins=(), context_tokens=0, won=won and 1.0)
    told, other = Tabulator(users).cells(["told", "other"], ["model"], ["other"])
    assert (told.accuracy, told.judged, told.win_rate.value, other.win_rate.value) == (None, 3, 1.0, 0.5)
    assert (told.differences["other"].low, told.differences["other"].value) == (0.5, 0.5)


def test_a_win_rate_without_a_judge_is_left_open() -> None:
    [cell] = Tabulator([user("ann", {"told": (1.0,)})]).cells(["told"], ["model"], [])
    assert (cell.win_rate, cell.judged) == (None, 0)


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_users_changes_nothing(random: Random) -> None:
    shuffled = random.sample(FOUR, len(FOUR))
    table, other = Tabulator(FOUR), Tabulator(shuffled)
    for make in (lambda t: t.cells(["told", "other"], ["model"], ["other"]), lambda t: t.controls(["model"])):
        assert make(table) == make(other)


def test_a_cell_whose_pairs_all_failed_has_no_accuracy_and_no_differences() -> None:
    users = [user(str(place), {"told": (None, None), "other": (1.0, None)}, won=1.0) for place in range(3)]
    for one in users:
        failed = one.cells["told", "model"].model_copy(update={"error": "too long"})
        one.cells["told", "model"] = failed
        one.cells["lost", "model"] = failed
    told, other, _ = Tabulator(users).cells(["told", "other", "lost"], ["model"], ["told", "other", "lost"])
    assert (told.accuracy, told.by_seed, told.differences, told.accuracy_quantiles) == (None, {}, {}, [])
    assert (told.pairs, told.unscored, told.error) == (6, 6, "too long")
    assert told.unavailable == "none of its 6 pairs could be scored (too long)"
    assert told.win_rate.value == 1
    assert (other.accuracy.value, other.differences, other.unscored, other.unavailable) == (0.75, {}, 3, None)


def test_a_cell_that_was_not_measured_is_unavailable_for_its_reason() -> None:
    [told, absent] = Tabulator(FOUR).cells(
        ["told", "absent"], ["model"], ["absent"], refused={("absent", "model"): "no"}
    )
    assert absent == Cell(row="absent", column="model", unavailable="no")
    assert (told.accuracy.value, told.differences) == (0.5, {})


@pytest.mark.parametrize("facts", [{"perfect_choice": None}, {"perfect_choice": [1.0, 0.0]}, {"perfect_choice": "1"}])
def test_a_perfect_choice_that_is_not_one_number_a_pair_is_unknown(facts: dict[str, object]) -> None:
    ann = user("ann", {"told": (1.0,)})
    ann.example = ann.example.model_copy(update={"facts": facts})
    assert [control.name for control in Tabulator([ann]).controls(["model"])] == ["longest-answer", "plain-likelihood"]


def test_controls_need_no_summary() -> None:
    ann, bob = user("ann", {"told": (1.0, 1.0)}), user("bob", {"told": (1.0,)})
    controls = {control.name: control for control in Tabulator([ann, bob]).controls(["model"])}
    assert set(controls) == {"longest-answer", "plain-likelihood"}
    assert controls["longest-answer"].accuracy.value == 1
    assert controls["plain-likelihood"].accuracy.value == 0
    for one, known in ((ann, [1.0, 0.0]), (bob, [1.0])):
        one.example = one.example.model_copy(update={"facts": {"perfect_choice": known}})
    [perfect] = [c for c in Tabulator([ann, bob]).controls(["model"]) if c.name == "perfect-chooser"]
    assert perfect.accuracy.value == pytest.approx(2 / 3)
    assert perfect.column is None


class Words:
    """Reads a taste off every claim "dimension: side"; the truth is in the facts."""

    def claimed(self, summary: str) -> dict[str, str]:
        lines = (line.removeprefix("- ").partition(": ") for line in summary.splitlines())
        return {dimension: side for dimension, _, side in lines if side}

    def true(self, example: PersonalizationExample) -> dict[str, str] | None:
        return example.facts.get("tastes")

    def evident(self, example: PersonalizationExample) -> dict[str, str] | None:
        return None


def written(one: MeasuredUser, *claims: str) -> PreferenceSummary:
    provenance = Provenance(author=Author.INFERRED)
    return summarize_claims(one.example.user.user_id, [Claim(text=claim) for claim in claims], provenance)


def summarized(name: str, tastes: dict[str, str], *claims: str) -> MeasuredUser:
    one = user(name, {"told": (1.0,)})
    one.example = one.example.model_copy(update={"facts": {"tastes": tastes}})
    one.summaries["told"] = written(one, *claims)
    return one


def test_faithfulness_is_pooled_over_claims() -> None:
    ann = summarized("ann", {"length": "short", "tone": "dry", "emoji": "none"}, "length: short", "tone: warm")
    bob = summarized("bob", {"length": "long"}, "length: long", "format: list", "something nice")
    report = Tabulator([ann, bob, summarized("cho", {"tone": "dry"})]).summaries("told", Words())
    assert report.truth is not None
    assert report.truth.precision is not None
    assert report.truth.recall is not None
    assert report.truth.precision.value == 0.5  # 2 of 4
    assert report.truth.recall.value == 0.4  # 2 of 5
    assert report.evidence is None
    assert report.not_enough_evidence == pytest.approx(1 / 3)
    assert report.claims == {"true": 0.4, "opposite": 0.2, "idle": 0.2, "unchecked": 0.2}
    assert report.claims_quantiles[2] == 2  # of 0, 2 and 3 claims
    assert report.precision_quantiles == [0.5] * 5  # who claims nothing has none


def test_nobody_claims_anything() -> None:
    report = Tabulator([summarized("ann", {"tone": "dry"})]).summaries("told", Words())
    assert report.truth is not None
    assert report.truth.precision is None
    assert report.truth.recall is not None
    assert report.truth.recall.value == 0
    assert set(report.claims.values()) == {0}


def test_without_a_reader_claims_are_only_counted() -> None:
    report = Tabulator([summarized("ann", {}, "length: short")]).summaries("told", None)
    assert (report.truth, report.evidence, report.claims) == (None, None, {})
    assert report.claims_quantiles == [1] * 5
