from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.data.convert import Conversion
from popi.data.dsp import AUDIENCES, convert_dsp, split_dsp
from popi.data.example import HeldOutPair, PersonalizationExample, check_held_out, text_key
from popi.data.reading import read_examples
from popi.errors import InputError
from popi.io import write_jsonl
from popi.signals import PreferencePair


def record(number: int, **changed: Any) -> dict[str, Any]:
    answers = {audience: f"{audience} {number}" for audience in (*AUDIENCES, "normal")}
    return {"query": f"query {number}", "responses": answers | changed}


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path_factory.mktemp("dsp") / "queries.json"
        path.write_text(json.dumps(content))
        return path

    return write


def check(conversion: Conversion, records: list[dict[str, Any]]) -> None:
    """Every pair is the own audience's answer before another's, and no query serves an audience twice."""
    answers = {entry["query"].strip(): entry["responses"] for entry in records}
    asked: set[tuple[str, str]] = set()
    for example in conversion.examples:
        audience = example.user.user_id.split("-")[0]
        assert example.facts["audience"] == audience
        for pair in (*example.user.signals, *example.tests):
            assert not isinstance(pair, PreferencePair) or pair.is_evidence
            responses = answers[pair.prompt]
            assert pair.chosen == responses[audience].strip() != pair.rejected
            assert pair.rejected in {responses[other].strip() for other in AUDIENCES if other != audience}
            assert (audience, pair.prompt) not in asked
            asked.add((audience, pair.prompt))


def queries_of(examples: Iterable[PersonalizationExample]) -> set[str]:
    """The queries of the signals and held-out pairs."""
    queries = set()
    for example in examples:
        for pair in (*example.user.signals, *example.tests):
            assert isinstance(pair, PreferencePair | HeldOutPair)
            queries.add(text_key(pair.prompt))
    return queries


@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 4), st.integers(0, 3))
def test_deals_every_query_once_to_users_of_each_audience(
    save: Callable[[Any], Path], queries: int, signals: int, tests: int, seed: int
) -> None:
    records = [record(number) for number in range(queries)]
    users, left = divmod(queries, signals + tests)
    if not users:
        with pytest.raises(InputError, match=f"contains {queries} queries, too few for a user of {signals + tests}"):
            convert_dsp(save(records), signals_per_user=signals, tests_per_user=tests, seed=seed)
        return
    conversion = convert_dsp(save(records), signals_per_user=signals, tests_per_user=tests, seed=seed)
    check(conversion, records)
    assert [example.user.user_id for example in conversion.examples] == [
        f"{audience}-{number:03d}" for audience in AUDIENCES for number in range(users)
    ]
    assert {len(example.user.signals) for example in conversion.examples} == {signals}
    assert {len(example.tests) for example in conversion.examples} == {tests}
    assert len(conversion.dropped) == left * len(AUDIENCES)
    assert conversion.summary() == {
        "users": 4 * users,
        "signals": 4 * users * signals,
        "tests": 4 * users * tests,
        "dropped": 4 * left,
    }


def test_the_seed_decides_who_has_which_query_and_what_is_rejected(save: Callable[[Any], Path]) -> None:
    path = save([record(number) for number in range(16)])
    first, again, other = (convert_dsp(path, seed=seed) for seed in (1, 1, 2))
    assert first == again
    pairs = [{test.prompt: test.rejected for user in made.examples for test in user.tests} for made in (first, other)]
    dealt = [[[test.prompt for test in user.tests] for user in made.examples] for made in (first, other)]
    assert dealt[0] != dealt[1]
    assert pairs[0] != pairs[1]
    assert dealt[0][0] != dealt[0][2]


def test_identical_answers_are_dropped_and_counted(save: Callable[[Any], Path]) -> None:
    records = [record(number) for number in range(8)]
    records[3]["responses"]["business"] = " academy 3\n"
    records[5]["responses"] = dict.fromkeys((*AUDIENCES, "normal"), "the same for all")
    conversion = convert_dsp(save(records), signals_per_user=3, tests_per_user=4)
    check(conversion, records)
    # Query 3 has one pair of equal answers, query 5 all six of them, and so no use to any of the four audiences.
    assert [(entry["dropped because"], entry["count"]) for entry in conversion.reasons()] == [
        ("two responses are the same text", 7),
        ("no other audience has a different response", 4),
    ]
    assert conversion.reasons()[0]["first"] == "queries.json[3].responses.academy and business"
    assert len(conversion.examples) == 4


def test_broken_records_are_dropped_with_index_field_and_reason(save: Callable[[Any], Path]) -> None:
    good = [record(number) for number in range(4)]
    bad = [
        "text",
        {"query": "q"},
        record(9, business=5),
        record(9, literature=" "),
        {"query": "", "responses": record(9)["responses"]},
        good[0],
    ]
    conversion = convert_dsp(save([*good, *bad]), signals_per_user=2, tests_per_user=2)
    check(conversion, good)
    assert [(item.file, item.index, item.field) for item in conversion.dropped] == [
        ("queries.json", 4, ""),
        ("queries.json", 5, "responses"),
        ("queries.json", 6, "responses.business"),
        ("queries.json", 7, "responses.literature"),
        ("queries.json", 8, "query"),
        ("queries.json", 9, "query"),
    ]
    assert [item.reason for item in conversion.dropped][::5] == ["is not a JSON object", "repeats an earlier query"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"query": "q"}, "is not a list of queries with responses"),
        ([], "contains no queries with responses; give"),
        (
            [{"preference": "x"}],
            r"the first of 1 dropped: queries\.json\[0\]\.query, field required\)",
        ),
    ],
)
def test_another_file_is_refused(save: Callable[[Any], Path], content: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        convert_dsp(save(content))


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"query":\n"q",]')
    with pytest.raises(InputError, match=r"x\.json:2: is not JSON \(.+ at character 5\)"):
        convert_dsp(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be read"):
        convert_dsp(tmp_path / "missing.json")


def test_a_folder_of_files_is_read_as_one(save: Callable[[Any], Path], tmp_path: Path) -> None:
    records = [record(number) for number in range(16)]
    for part, name in ((records[:9], "test"), (records[8:], "train")):
        (tmp_path / f"domain_specific_preference.{name}.json").write_text(json.dumps(part))
    (tmp_path / "other.json").write_text("{}")
    conversion = convert_dsp(tmp_path)
    assert conversion.examples == convert_dsp(save(records)).examples
    assert [(item.place, item.reason) for item in conversion.dropped] == [
        ("other.json", "is not domain_specific_preference*.json"),
        ("domain_specific_preference.train.json[0].query", "repeats an earlier query"),
    ]
    assert convert_dsp(tmp_path / "domain_specific_preference.test.json").summary()["users"] == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no queries with responses"):
        convert_dsp(tmp_path / "empty")


@given(
    st.lists(st.sampled_from("ABCDEFGHIJKLMNOPabcdefgh"), min_size=8, max_size=30),
    st.floats(0.2, 0.8),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_no_query_for_evaluation_is_in_training_for_any_audience(
    save: Callable[[Any], Path], names: list[str], fraction: float, signals: int, tests: int, rejected: int, seed: int
) -> None:
    path = save([record(number) | {"query": f"query {name}"} for number, name in enumerate(names)])
    sizes = {"signals_per_user": signals, "tests_per_user": tests, "rejected_per_test": rejected, "seed": seed}
    try:
        train, evaluation = split_dsp(path, fraction=fraction, **sizes)  # type: ignore[arg-type]
    except InputError as error:
        assert "too few for a user" in error.what or "leaves none of them for" in error.what
        return
    assert not queries_of(train.examples) & queries_of(evaluation.examples)
    for part in (train, evaluation):
        assert {len(example.user.signals) for example in part.examples} == {signals}
        assert {len(example.tests) for example in part.examples} == {tests * rejected}
        assert {example.facts["audience"] for example in part.examples} == set(AUDIENCES)
        for example in part.examples:
            check_held_out(example)
    ids = [example.user.user_id for part in (train, evaluation) for example in part.examples]
    assert len(set(ids)) == len(ids)
    assert split_dsp(path, fraction=fraction, **sizes) == (train, evaluation)  # type: ignore[arg-type]


def test_the_division_does_not_depend_on_the_sizes_of_users(save: Callable[[Any], Path]) -> None:
    path = save([record(number) for number in range(20)])
    first, second = (
        [queries_of(part.examples) for part in split_dsp(path, fraction=0.3, seed=5, **sizes)]
        for sizes in ({"signals_per_user": 1, "tests_per_user": 1}, {"signals_per_user": 2, "tests_per_user": 0})
    )
    # 14 and 6 queries, all of them used by users of two.
    assert [len(queries) for queries in first] == [14, 6]
    assert first == second


def test_each_rejected_response_is_a_pair_of_its_own(save: Callable[[Any], Path]) -> None:
    records = [record(number) for number in range(4)]
    for entry in records:
        entry["responses"]["literature"] = entry["responses"]["business"].upper()
    conversion = convert_dsp(save(records), signals_per_user=1, tests_per_user=3, rejected_per_test=3)
    for example in conversion.examples:
        check_held_out(example)
        rejected = Counter(pair.prompt for pair in example.tests)
        # Business and literature have the same response but for case, so others reject one of the two.
        own = example.facts["audience"] in ("business", "literature")
        assert set(rejected.values()) == ({3} if own else {2})


def test_each_part_says_what_it_dropped(save: Callable[[Any], Path]) -> None:
    records: list[Any] = [record(number) for number in range(10)]
    train, evaluation = split_dsp(save(["text", *records]), fraction=0.3, signals_per_user=1, tests_per_user=1)
    assert [(entry["dropped because"], entry["count"]) for entry in train.reasons()] == [
        ("too few queries are left for another user", 4),
        ("is not a JSON object", 1),
    ]
    assert [(entry["dropped because"], entry["count"]) for entry in evaluation.reasons()] == [
        ("too few queries are left for another user", 4)
    ]
    with pytest.raises(InputError, match="contains 3 queries for evaluation, too few for a user of 4"):
        split_dsp(save(records), fraction=0.3, signals_per_user=2, tests_per_user=2)


@pytest.mark.parametrize("rejected", [0, 4])
def test_a_query_has_three_responses_to_reject(save: Callable[[Any], Path], rejected: int) -> None:
    with pytest.raises(InputError, match=f"cannot have {rejected} rejected responses; request 1 to 3"):
        convert_dsp(save([record(0)]), rejected_per_test=rejected)


@pytest.mark.parametrize(("signals", "tests"), [(0, 4), (4, -1)])
def test_refuses_numbers_that_make_no_user(save: Callable[[Any], Path], signals: int, tests: int) -> None:
    with pytest.raises(InputError, match="a user cannot have"):
        convert_dsp(save([record(0)]), signals_per_user=signals, tests_per_user=tests)


def test_the_publishers_file(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "dsp" / "domain_specific_preference.test.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    conversion = convert_dsp(path)
    check(conversion, records)
    equal = [
        (index, one, other)
        for index, entry in enumerate(records)
        for one, other in combinations(AUDIENCES, 2)
        if entry["responses"][one].strip() == entry["responses"][other].strip()
    ]
    counts = {entry["dropped because"]: entry["count"] for entry in conversion.reasons()}
    assert counts["two responses are the same text"] == len(equal) > 0
    # Every query is with a user of each audience, or is told to be dropped for it.
    used = conversion.summary()["signals"] + conversion.summary()["tests"]
    assert used + len(conversion.dropped) - len(equal) == len(records) * len(AUDIENCES)
    write_jsonl(tmp_path / "dsp.jsonl", conversion.examples)
    assert tuple(read_examples(tmp_path / "dsp.jsonl")) == conversion.examples


def test_the_publishers_file_divides_by_queries(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "dsp" / "domain_specific_preference.test.json"
    train, evaluation = split_dsp(path, fraction=0.3, tests_per_user=5, rejected_per_test=3)
    assert not queries_of(train.examples) & queries_of(evaluation.examples)
    users = Counter(example.facts["audience"] for example in evaluation.examples)
    pairs = Counter(example.facts["audience"] for example in evaluation.examples for _ in example.tests)
    assert set(users.values()) == {21}
    assert min(pairs.values()) >= 300
    for name, part in (("train", train), ("eval", evaluation)):
        write_jsonl(tmp_path / f"{name}.jsonl", part.examples)
        assert tuple(read_examples(tmp_path / f"{name}.jsonl")) == part.examples
