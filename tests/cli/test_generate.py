from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.errors import BackendError
from popi.prompts import DEFAULT
from popi.roles import Conditioned
from popi.summary import Author, PreferenceSummary, Provenance
from popi_generators import PromptedGenerator

from .conftest import Models, Ran, at_once

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
            return ChatResult.failed("cannot", "request", model="m")
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


@pytest.mark.parametrize("stream", [[], ["--stream"], ["--stream", "--json"]])
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (ChatResult.failed("cannot", "request", model="m"), "cannot"),
        ("", "the response is empty"),
        ("<think>hmm", "the model wrote reasoning and no response"),
        (ChatResult("", "refused", error="the model refused: no"), "the model refused: no"),
    ],
)
def test_a_response_that_is_none_is_one_line(
    answer: str | ChatResult, says: str, stream: list[str], popi: Run, models: Models
) -> None:
    models.answers = lambda request: answer
    ran = popi("generate", "--model", "m", "--prompt", "How?", *stream)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("popi: ")
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert models.closed == models.made


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_truncated_response_is_shown_with_a_note(stream: list[str], popi: Run) -> None:
    ran = popi("generate", "--model", "m", "--prompt", "How?", "--summary", "- Short", "--max-tokens", 2, *stream)
    assert ran.code == 0
    assert (ran.out if stream else ran.record["response"]) == ("Told: -\n" if stream else "Told: -")
    assert ran.err == "popi: the response is incomplete: it was truncated after 2 tokens; raise --max-tokens\n"


def test_a_stream_that_breaks_leaves_the_terminal_on_a_new_line(popi: Run, models: Models) -> None:
    class Breaking(models.kind):  # type: ignore[name-defined, misc]
        async def stream(self, request: ChatRequest, *args: Any) -> AsyncIterator[str]:
            yield "Told"
            raise BackendError("m: the connection broke", failure="unreachable")

    models.kind = Breaking
    ran = popi("generate", "--model", "m", "--prompt", "How?", "--stream")
    assert (ran.code, ran.out, ran.err) == (1, "Told\n", "popi: m: the connection broke\n")


class Shouting(PromptedGenerator):
    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        return [replace(result, text=result.text.upper()) for result in await super().respond(items)]


def test_a_generator_of_ones_own_responds(popi: Run) -> None:
    args = ("generate", "--model", "m", "--prompt", "How?", "--generation", f"{__name__}:Shouting")
    assert popi(*args).record["response"] == "TOLD: ."


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "no prompt given; give --prompt TEXT, or --prompts FILE and --out FILE"),
        (["--prompts", "p.jsonl"], "no prompt given"),
        (["--prompt", "How?", "--out", "o.jsonl"], "--out cannot be combined with --prompt; remove one of them"),
        (["--prompts", "p.jsonl", "--out", "o.jsonl", "--stream"], "--stream cannot be combined with --prompts"),
        (["--prompt", "How?", "--user", "ann"], "--summaries and --user need each other; give both or neither"),
        (["--prompt", "How?", "--summaries", "FILE"], "--summaries and --user need each other"),
        (["--prompt", "How?", "--summaries", "FILE", "--user", "ann", "--summary", "x"], "combined with --summaries"),
        (["--prompt", "How?", "--summaries", "FILE", "--user", "anna"], "no summary of user 'anna'; did you mean ann?"),
        (["--prompt", "How?", "--generation", "promted"], "unknown generator 'promted'; did you mean prompted?"),
        (["--prompt", "How?", "--prompt-set", "nil"], "unknown prompt set 'nil'"),
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
    assert models.chats == []


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
        common = ("--model", "m", "--prompts", path, "--out", tmp_path / "answers.jsonl", "--max-concurrency", 2)
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
        "of these truncated": 0,
        "failed": 0,
        "out": str(tmp_path / "answers.jsonl"),
    }
    assert answers(tmp_path) == ANSWERS
    assert models.closed == models.made
    meta = json.loads((tmp_path / "answers.jsonl.meta.json").read_text())
    assert meta["settings"] == {
        "model": "m",
        "generation": "prompted",
        "max_tokens": 256,
        "temperature": 0.0,
        "seed": 0,
        "summary_tokens": None,
        "prompts": None,
        "template_hash": DEFAULT.hash,
    }


def test_goes_on_where_it_stopped(answer_all: Run, models: Models, tmp_path: Path) -> None:
    async def die(calls: int) -> None:
        if calls == 2:
            raise BackendError("gone")

    models.before = die
    ran = answer_all(PROMPTS)
    assert ran.code == 1
    assert "popi: gone; finished responses are kept in" in ran.err
    kept = answers(tmp_path)
    assert kept[:2] == ANSWERS[:2] and len(kept) < 4
    models.before = at_once
    assert answer_all(PROMPTS).record["already done"] == len(kept)
    assert sorted(answers(tmp_path)) == ANSWERS
    assert len({line for line, *_ in answers(tmp_path)}) == 4


def test_truncated_responses_are_counted(answer_all: Run) -> None:
    ran = answer_all(PROMPTS, "--max-tokens", 2)
    assert (ran.code, ran.record["of these truncated"]) == (0, 3)
    assert ran.err.endswith("popi: 3 responses were truncated; raise --max-tokens\n")


def test_bad_rows_are_reported_together_or_skipped(answer_all: Run, tmp_path: Path, models: Models) -> None:
    rows = [PROMPTS[0], {"user_id": "nobody", "prompt": "One?"}, "{half", {"user_id": 7}, PROMPTS[1]]
    ran = answer_all(rows)
    assert ran.code == 2
    assert "3 bad rows; the first: line 2, field user_id: no summary of user 'nobody'" in ran.err
    assert models.made == []
    ran = answer_all(rows, "--skip-bad-rows")
    assert (ran.code, ran.record["prompts"], ran.record["written"]) == (0, 2, 2)
    assert [line for line, *_ in answers(tmp_path)] == [1, 5]


def test_a_null_user_is_a_plain_prompt(answer_all: Run, tmp_path: Path) -> None:
    assert answer_all([{"user_id": None, "prompt": "Three?"}, {"user_id": " ann ", "prompt": "One?"}]).code == 0
    assert answers(tmp_path) == [(1, None, "Three?", "Told: ."), (2, "ann", "One?", "Told: - Short.")]


def test_an_empty_response_of_many_is_a_failed_prompt(answer_all: Run, models: Models, tmp_path: Path) -> None:
    models.answers = lambda request: "" if "Two?" in request.messages[0].content else "Fine."
    ran = answer_all(PROMPTS)
    assert (ran.code, ran.record["failed"], ran.record["written"]) == (1, 1, 3)
    assert "popi: no response to line 2: the response is empty: the model wrote no text\n" in ran.err


def test_a_prompt_that_fails_is_named_and_tried_again(answer_all: Run, tmp_path: Path) -> None:
    ran = answer_all([*PROMPTS[:1], {"prompt": "fail"}])
    assert ran.code == 1
    assert "popi: no response to line 2: cannot\n" in ran.err
    assert ran.err.endswith("1 of 2 prompts have no response; the same command tries them again\n")
    assert answers(tmp_path) == ANSWERS[:1]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([{"user_id": "ann", "prompt": "Another?"}], ":1: the prompt or the summary has changed since"),
        ([*PROMPTS, {"user_id": "bo", "prompt": "X?"}], ":5, field user_id: no summary of user 'bo'"),
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


@pytest.mark.parametrize("option", ["--prompts", "--summaries", "--out"])
@pytest.mark.parametrize("kind", ["folder", "binary", "gguf", "json", "pipe"])
def test_a_path_of_another_kind_is_one_line(
    option: str, kind: str, popi: Run, write_lines: Write, summaries: Path, tmp_path: Path
) -> None:
    if (option, kind) == ("--summaries", "pipe"):
        pytest.skip("summaries are read once")
    path = tmp_path / (kind if kind in ("folder", "pipe") else f"file.{kind}")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"[1, 2]\n" if kind == "json" else b"\x93GGUF\x00\xff\n")
    paths = {
        "--prompts": write_lines("prompts.jsonl", *PROMPTS),
        "--summaries": summaries,
        "--out": tmp_path / "out.jsonl",
    }
    ran = popi("generate", "--model", "m", *(word for pair in (paths | {option: path}).items() for word in pair))
    assert ran.code == 2
    assert str(path) in ran.err
    assert ran.err.count("\n") == 1 and len(ran.err) < 400
