from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popi.data.miniworld import SPLITS, generate
from popi.data.reading import read_examples

from .conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    """Eight queries in the form of DSP; in the third, two answers are equal."""
    audiences = ("academy", "business", "entertainment", "literature")
    records = [{"query": f"q{n}", "responses": {name: f"{name} {n}" for name in audiences}} for n in range(8)]
    records[2]["responses"] |= {"business": "same", "literature": "same"}  # type: ignore[operator]
    path = tmp_path / "queries.json"
    path.write_text(json.dumps(records))
    return path


def records(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.out.splitlines()]


def test_converts_dsp_and_says_what_was_dropped(popi: Run, queries: Path, tmp_path: Path) -> None:
    out = tmp_path / "users.jsonl"
    ran = popi("data", "convert", "dsp", queries, "--out", out, "--signals", 2, "--tests", 1)
    assert (ran.code, ran.err) == (0, "")
    summary, *dropped = records(ran)
    # Eight queries make two users of three queries for each audience; two queries are left for none of the four.
    assert summary == {"users": 8, "signals": 16, "tests": 8, "dropped": 9, "out": str(out)}
    assert dropped[0] == {
        "reason": "two responses are the same text",
        "file": "queries.json",
        "index": 2,
        "field": "responses.business and literature",
    }
    assert len(dropped) == 9
    assert len(list(read_examples(out))) == 8


def test_divides_dsp_by_queries_and_reports_both_files(popi: Run, queries: Path, tmp_path: Path) -> None:
    out, eval_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    options = ("--eval-out", eval_out, "--eval-fraction", 0.25, "--signals", 1, "--tests", 1, "--rejected", 2)
    ran = popi("data", "convert", "dsp", queries, "--out", out, *options)
    assert (ran.code, ran.err) == (0, "")
    train, evaluation, *dropped = records(ran)
    # Six queries make three users of each audience, and two make one. Query 2 has two equal answers.
    assert train == {"users": 12, "signals": 12, "tests": 24, "dropped": train["dropped"], "out": str(out)}
    assert evaluation == {"users": 4, "signals": 4, "tests": 8, "dropped": 1 - train["dropped"], "out": str(eval_out)}
    assert [entry["reason"] for entry in dropped] == ["two responses are the same text"]
    assert dropped[0]["out"] == str(out if train["dropped"] else eval_out)
    prompts = [
        {pair.prompt for user in read_examples(path) for pair in (*user.user.signals, *user.tests)}  # type: ignore[union-attr]
        for path in (out, eval_out)
    ]
    assert [len(found) for found in prompts] == [6, 2]
    assert not prompts[0] & prompts[1]


def test_divides_prefeval_by_topics(popi: Run, tmp_path: Path) -> None:
    folder, out, eval_out = tmp_path / "mcq_options", tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    folder.mkdir()
    for topic in "abcde":
        item = {"preference": f"I like {topic}.", "question": f"{topic}?", "classification_task_options": ["A", "B"]}
        (folder / f"{topic}.json").write_text(json.dumps([item]))
    ran = popi("data", "convert", "prefeval", folder, "--out", out, "--eval-out", eval_out)
    assert ran.code == 0
    assert [(record["users"], record["out"]) for record in records(ran)] == [(4, str(out)), (1, str(eval_out))]
    topics = [{example.facts["topic"] for example in read_examples(path)} for path in (out, eval_out)]
    assert topics[0] | topics[1] == set("abcde")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--eval-fraction", 0.5), "--eval-fraction divides the data, but only one file is written; give --eval-out"),
        (("--eval-out", "queries.json"), "queries.json: is the file to convert; name another file with --eval-out"),
        (("--eval-out", "./train.jsonl"), "train.jsonl: is also the file of --out; name another file with --eval-out"),
        (("--eval-out", "e", "--eval-fraction", 1), "field eval_fraction: 1 is not between 0 and 1"),
        (("--eval-out", "e", "--tests", 1), "contains 2 queries for evaluation, too few for a user of 5; request"),
        (("--eval-out", "folder", "--signals", 1, "--tests", 1), "folder: is a folder; name a file in it"),
        (("--rejected", 4), "'--rejected': Input should be less than or equal to 3"),
        (("--max-words", 0), "'--max-words': Input should be greater than or equal to 1"),
    ],
)
def test_neither_file_is_written_if_one_cannot_be(
    popi: Run, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    ran = popi("data", "convert", "dsp", "queries.json", "--out", "train.jsonl", *options)
    assert ran.code == 2
    assert says in ran.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "queries.json"]


def test_cuts_answers_of_both_sides_and_reports_their_lengths(popi: Run, tmp_path: Path) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "users.jsonl"
    table.write_text(
        "user_id,kind,prompt,chosen,rejected\n"
        "ann,pair,How much?,To here.,Fill it to here. Then wait.\n"
        "ann,held_out,How long?,One hour. Then look at it.,One hour. Then look away\n"
        "ann,held_out,How often?,Once,Twice in an hour and again\n"
    )
    ran = popi("data", "convert", "csv", table, "--out", out, "--max-words", 4)
    assert (ran.code, ran.err) == (0, "")
    summary, chosen, rejected, dropped = records(ran)
    assert summary == {"users": 1, "signals": 1, "tests": 1, "dropped": 1, "out": str(out)}
    lengths = {"max_words": 4, "answers": 3, "out": str(out)}
    assert chosen == lengths | {
        "side": "chosen",
        "cut": 1,
        "marked": 0,
        "words_before": 3.0,
        "words_after": 1.67,
    }
    assert rejected == lengths | {
        "side": "rejected",
        "cut": 3,
        "marked": 1,
        "words_before": 5.67,
        "words_after": 3.33,
    }
    assert dropped == {
        "reason": "both responses are the same text after cutting",
        "file": "table.csv",
        "field": "tests.0",
        "user": "ann",
    }
    [example] = read_examples(out)
    assert example.tests[0].rejected == "Twice in an hour…"
    assert example.facts == {"max_words": 4, "cut_answers": 4}


def test_answers_of_dsp_and_prefeval_are_cut_too(popi: Run, queries: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "users.jsonl", tmp_path / "mcq_options"
    assert popi("data", "convert", "dsp", queries, "--out", out, "--max-words", 1).code == 0
    users = list(read_examples(out))
    chosen = {pair.chosen for user in users for pair in user.tests}
    assert chosen - {"same"} == {f"{user.facts['audience']}…" for user in users}
    folder.mkdir()
    item = {"preference": "I like hats.", "question": "Which?", "classification_task_options": ["A hat.", "My cap."]}
    (folder / "hats.json").write_text(json.dumps([item]))
    assert popi("data", "convert", "prefeval", folder, "--out", out, "--max-words", 1).code == 0
    [example] = read_examples(out)
    assert (example.tests[0].chosen, example.tests[0].rejected) == ("A…", "My…")


def test_on_a_terminal_the_report_is_by_reason(
    popi: Run, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "400")
    ran = popi("data", "convert", "dsp", queries, "--out", tmp_path / "users.jsonl")
    assert ran.code == 0
    rows = [re.split(r"\s{2,}", line.strip()) for line in ran.out.splitlines()]
    assert [row for row in rows if any(cell.isdigit() for cell in row)] == [
        ["4", "16", "16", "1", str(tmp_path / "users.jsonl")],
        ["two responses are the same text", "1", "queries.json[2].responses.business and literature"],
    ]


def test_converts_prefeval(popi: Run, tmp_path: Path) -> None:
    folder = tmp_path / "mcq_options"
    folder.mkdir()
    item = {"preference": "I like hats.", "question": "Which?", "classification_task_options": ["A hat.", "A cap."]}
    (folder / "hats.json").write_text(json.dumps([item, {"preference": "I like caps."}]))
    ran = popi("data", "convert", "prefeval", folder, "--out", tmp_path / "users.jsonl", "--seed", 1)
    assert ran.code == 0
    assert records(ran) == [
        {"users": 1, "signals": 1, "tests": 1, "dropped": 1, "out": str(tmp_path / "users.jsonl")},
        {"reason": "field required", "file": "hats.json", "index": 1, "field": "question"},
    ]
    [example] = read_examples(tmp_path / "users.jsonl")
    assert example.tests[0].chosen == "A hat."


def test_converts_a_table_and_says_what_was_dropped(popi: Run, tmp_path: Path) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "users.jsonl"
    table.write_text("user_id;text;mood\nann;I like lists.;good\n7;Short, please.;\n7;Short, please.;\n")
    ran = popi("data", "convert", "csv", table, "--out", out)
    assert (ran.code, ran.err) == (0, "")
    assert records(ran) == [
        {"users": 2, "signals": 2, "tests": 0, "dropped": 2, "out": str(out)},
        {"reason": "unknown column", "file": "table.csv", "field": "mood"},
        {"reason": "repeats an earlier row", "file": "table.csv", "line": 4},
    ]
    assert [example.user.user_id for example in read_examples(out)] == ["ann", "7"]


def test_converts_a_chat_log(popi: Run, tmp_path: Path) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "users.jsonl"
    messages = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "Keep it short."}]
    log.write_text(json.dumps({"messages": messages, "user": "ann"}))
    ran = popi("data", "convert", "chat", log, "--out", out)
    assert (ran.code, ran.err) == (0, "")
    assert records(ran) == [
        {"users": 1, "signals": 1, "tests": 0, "dropped": 1, "out": str(out)},
        {"reason": "turn of the role system", "file": "log.jsonl", "line": 1, "field": "messages.0"},
    ]
    [example] = read_examples(out)
    assert example.user.signals[0].is_evidence


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("csv", "user_id,text\nann,Hi.\n", ",Hi.\n"),
        ("chat", '{"messages": [{"role": "user", "content": "Hi."}], "user": "ann"}\n', '{"user": "ann"}\n'),
    ],
)
def test_bad_rows_are_reported_and_skipped_on_request(
    popi: Run, tmp_path: Path, form: str, good: str, bad: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "users.jsonl"
    source.write_text(good + 12 * bad)
    ran = popi("data", "convert", form, source, "--out", out)
    first, *lines = ran.err.splitlines()
    assert (ran.code, ran.out, out.exists()) == (2, "", False)
    assert first.startswith(f"popi: {source}: 12 bad rows; the first: line ")
    assert first.endswith("; fix them, or continue without them with --skip-bad-rows")
    assert all(re.match(rf"popi: {source}:\d+, field (user_id|messages): ", line) for line in lines[:-1])
    assert (len(lines), lines[-1]) == (10, "popi: ... and 2 more")
    ran = popi("data", "convert", form, source, "--out", out, "--skip-bad-rows")
    assert ran.code == 0
    assert re.fullmatch(rf"popi: skipped 12 bad rows; the first: {source}:\d+, field .*\n", ran.err)
    summary, *dropped = records(ran)
    assert (summary["users"], summary["dropped"], len(dropped)) == (1, 12, 12)


def test_the_source_is_never_overwritten(popi: Run, queries: Path) -> None:
    before = queries.read_text()
    ran = popi("data", "convert", "dsp", queries, "--out", queries, "--signals", 1, "--tests", 1)
    assert (ran.code, ran.err) == (2, f"popi: {queries}: is the file to convert; name another file with --out\n")
    assert queries.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("convert", "dsp", "missing.json"), "missing.json: cannot be read"),
        (("convert", "prefeval", "missing"), "missing: cannot be read"),
        (("convert", "csv", "missing.csv"), "missing.csv: cannot be read"),
        (("convert", "chat", "missing.jsonl"), "missing.jsonl: cannot be read"),
        (("miniworld", "--users", "2", "--split", "everything"), "unknown split 'everything'; use one of train,"),
        (("miniworld", "--users", "0"), "greater than or equal to 1"),
        (("miniworld", "--users", "2", "--format", "csv"), "'csv' is not one of 'jsonl', 'dataset'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    popi: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = popi("data", *arguments, "--out", "users")
    assert ran.code == 2
    assert says in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_makes_a_mini_world(popi: Run, tmp_path: Path) -> None:
    out = tmp_path / "world.jsonl"
    options = ("--users", 3, "--split", "validation", "--seed", 7, "--signals", 5, "--tests", 2)
    ran = popi("data", "miniworld", "--out", out, *options)
    assert ran.code == 0
    assert ran.record == {
        "users": 3,
        "split": "validation",
        "seed": 7,
        "signals": 5,
        "tests": 2,
        "out": str(out),
    }
    assert list(read_examples(out)) == list(generate(split="validation", users=3, seed=7, signals=5, tests=2))


def test_a_data_set_holds_the_same_as_the_lines(popi: Run, tmp_path: Path) -> None:
    lines, folder = tmp_path / "world.jsonl", tmp_path / "world"
    assert popi("data", "miniworld", "--users", 3, "--out", lines).code == 0
    assert popi("data", "miniworld", "--users", 3, "--out", folder, "--format", "dataset").code == 0
    assert list(read_examples(folder)) == list(read_examples(lines))


def test_the_help_names_every_split(popi: Run) -> None:
    helped = popi("data", "miniworld", "--help").out
    assert all(split in " ".join(helped.replace("│", " ").split()) for split in SPLITS)


def test_without_datasets_the_extra_is_named(popi: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "popi.data.dataset")
    ran = popi("data", "miniworld", "--users", 1, "--out", tmp_path / "world", "--format", "dataset")
    assert (ran.code, ran.err.splitlines()[-1]) == (
        2,
        "popi: datasets is not installed; install it with: pip install 'popi[train]'",
    )
    assert list(tmp_path.iterdir()) == []
