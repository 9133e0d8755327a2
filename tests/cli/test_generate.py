from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.errors import BackendError
from popi.prompts import DEFAULT
from popi.summary import Author, PreferenceSummary, Provenance

from .conftest import Models, Ran

Run = Callable[..., Ran]
Write = Callable[..., Path]


def summary(user_id: str, text: str, **provenance: Any) -> dict[str, Any]:
    made = {"author": Author.INFERRED, "template_hash": DEFAULT.hash, **provenance}
    return PreferenceSummary(user_id=user_id, text=text, provenance=Provenance(**made)).model_dump(mode="json")


@pytest.fixture
def summaries(write_lines: Write) -> Path:
    return write_lines("summaries.jsonl", summary("ann", "- Short"), summary("bob", "- Long"))


@pytest.fixture(autouse=True)
def told(models: Models) -> None:
    """The model repeats the context that it was shown."""

    def answer(request: ChatRequest) -> str | ChatResult:
        content = request.messages[0].content
        if "fail" in content:
            return ChatResult("", "error", error="cannot")
        return f"Told: {content.partition('<<<')[2].partition('>>>')[0].strip()}."

    models.answers = answer


def test_answers_a_bare_prompt(popi: Run, models: Models) -> None:
    ran = popi("generate", "--model", "m", "--prompt", "How?", "--max-tokens", 9, "--temperature", 0.5, "--seed", 3)
    assert (ran.code, ran.err) == (0, "")
    assert ran.record["response"] == "Told: ."
    assert (ran.record["prompt"], ran.record["summary"], ran.record["model"]) == ("How?", None, "m")
    [request] = models.chats
    assert request.messages == DEFAULT.answer_messages("How?")
    assert (request.max_tokens, request.temperature, request.seed) == (9, 0.5, 3)
    assert models.closed == models.made


@pytest.mark.parametrize("args", [["--summary", "- Short"], ["--summaries", "FILE", "--user", "ann"]])
def test_answers_under_a_summary(args: list[str], popi: Run, summaries: Path, models: Models) -> None:
    ran = popi("generate", "--model", "m", "--prompt", "How?", *(summaries if arg == "FILE" else arg for arg in args))
    assert ran.record["response"] == "Told: - Short."
    assert models.chats[0].messages == DEFAULT.answer_messages("How?", "- Short")


def test_prints_the_bare_answer_on_a_terminal(popi: Run, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    models.answers = lambda request: "Two lines,\nand \x1b[2Jno command. 👩‍👩‍👧"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    ran = popi("generate", "--model", "m", "--prompt", "How?")
    assert ran.out == "Two lines,\nand \\x1b[2Jno command. 👩‍👩‍👧\n"


def test_streams_text_also_when_piped_and_json_lines_when_asked(popi: Run) -> None:
    args = ("generate", "--model", "m", "--prompt", "How?", "--summary", "- Short", "--stream")
    assert popi(*args).out == "Told: - Short.\n"
    *lines, last = map(json.loads, popi(*args, "--json").out.splitlines())
    assert len(lines) == 3
    assert "".join(line["piece"] for line in lines) == "Told: - Short." == last["response"]
    assert last == popi(*args[:-1], "--json").record


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_an_answer_that_fails_is_one_line(stream: list[str], popi: Run) -> None:
    ran = popi("generate", "--model", "m", "--prompt", "fail", *stream)
    assert ran.code == 1
    assert ran.err.startswith("popi: ")
    assert ran.err.endswith("cannot\n")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "nothing is asked; give --prompt TEXT, or --prompts FILE and --out FILE"),
        (["--prompts", "p.jsonl"], "nothing is asked"),
        (["--prompt", "How?", "--out", "o.jsonl"], "--out means nothing beside --prompt"),
        (["--prompts", "p.jsonl", "--out", "o.jsonl", "--stream"], "--stream means nothing beside --prompts"),
        (["--prompt", "How?", "--user", "ann"], "--summaries and --user belong together"),
        (["--prompt", "How?", "--summaries", "FILE"], "--summaries and --user belong together"),
        (["--prompt", "How?", "--summaries", "FILE", "--user", "ann", "--summary", "x"], "beside --summaries"),
        (["--prompt", "How?", "--summaries", "FILE", "--user", "anna"], "no summary of user 'anna'; did you mean ann?"),
        (["--prompt", "How?", "--summaries", "none.jsonl", "--user", "ann"], "none.jsonl: cannot be read"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8 text"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    args: list[str], says: str, popi: Run, summaries: Path, models: Models
) -> None:
    ran = popi("generate", "--model", "m", *(summaries if arg == "FILE" else arg for arg in args))
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert models.made == []


def test_summaries_made_with_other_templates_are_refused_unless_a_person_wrote_them(
    popi: Run, write_lines: Write
) -> None:
    old = summary("ann", "- Short", template_hash="0" * 12)
    by_hand = summary("bob", "- Long", author=Author.EDITED, template_hash="")
    path = write_lines("old.jsonl", by_hand, old)
    ran = popi("generate", "--model", "m", "--prompt", "How?", "--summaries", path, "--user", "bob")
    assert ran.code == 2
    assert f"{path}:2 was made with prompt templates 000000000000" in ran.err
    path = write_lines("by-hand.jsonl", by_hand)
    assert popi("generate", "--model", "m", "--prompt", "How?", "--summaries", path, "--user", "bob").code == 0


PROMPTS = [
    {"user_id": "ann", "prompt": "One?"},
    {"user_id": "bob", "prompt": "Two?"},
    {"prompt": "Three?"},
    {"user_id": "ann", "prompt": "One?"},
]


@pytest.fixture
def answer_all(popi: Run, write_lines: Write, summaries: Path, tmp_path: Path) -> Run:
    """Answers these prompts, two at a time."""

    def run(prompts: list[Any], *args: object) -> Ran:
        path = write_lines("prompts.jsonl", *prompts)
        common = ("--model", "m", "--prompts", path, "--out", tmp_path / "answers.jsonl", "--batch-size", 2)
        return popi("generate", *common, "--summaries", summaries, *args)

    return run


def answers(folder: Path) -> list[tuple[int, str | None, str, str]]:
    lines = map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["line"], line["user_id"], line["prompt"], line["response"]) for line in lines]


ANSWERS = [
    (1, "ann", "One?", "Told: - Short."),
    (2, "bob", "Two?", "Told: - Long."),
    (3, None, "Three?", "Told: ."),
    (4, "ann", "One?", "Told: - Short."),
]


def test_answers_many(answer_all: Run, models: Models, tmp_path: Path) -> None:
    ran = answer_all(PROMPTS)
    assert ran.code == 0
    assert ran.record == {
        "prompts": 4,
        "already done": 0,
        "written": 4,
        "failed": 0,
        "out": str(tmp_path / "answers.jsonl"),
    }
    assert answers(tmp_path) == ANSWERS
    assert models.closed == models.made
    meta = json.loads((tmp_path / "answers.jsonl.meta.json").read_text())
    assert meta["settings"]["model"] == "m"


def test_goes_on_where_it_stopped(answer_all: Run, models: Models, tmp_path: Path) -> None:
    def die(batches: int) -> None:
        if batches:
            raise BackendError("gone")

    models.before = die
    ran = answer_all(PROMPTS)
    assert ran.code == 1
    assert "popi: gone; what is finished is kept in" in ran.err
    assert answers(tmp_path) == ANSWERS[:2]
    models.before = lambda batches: None
    assert answer_all(PROMPTS).record["already done"] == 2
    assert answers(tmp_path) == ANSWERS
    assert len(models.chats) == 4


def test_a_prompt_that_fails_is_named_and_tried_again(answer_all: Run, tmp_path: Path) -> None:
    ran = answer_all([*PROMPTS[:1], {"prompt": "fail"}])
    assert ran.code == 1
    assert "popi: no answer to line 2: cannot\n" in ran.err
    assert ran.err.endswith("1 of 2 prompts have no answer; the same command tries them again\n")
    assert answers(tmp_path) == ANSWERS[:1]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([{"user_id": "ann", "prompt": "Another?"}], ":1: the prompt or the summary has changed since"),
        ([*PROMPTS, {"user_id": "bo", "prompt": "X?"}], ":5, field user_id: there is no summary of user 'bo'"),
        ([*PROMPTS, {"user_id": "ann"}], ":5, field prompt: field required"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_any_work(
    prompts: list[Any], says: str, answer_all: Run, models: Models, tmp_path: Path
) -> None:
    answer_all(PROMPTS)
    ran = answer_all(prompts)
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert len(models.made) == 1
    assert answers(tmp_path) == ANSWERS


def test_answers_made_with_other_settings_are_refused(answer_all: Run) -> None:
    answer_all(PROMPTS)
    ran = answer_all(PROMPTS, "--max-tokens", 5)
    assert ran.code == 2
    assert "was made with max_tokens 256, not 5" in ran.err
