from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from popi.backends.base import Backend, ChatRequest, ChatResult
from popi.cli.growing import GrowingFile
from popi.errors import BackendError, ModelError
from popi.prompts import DEFAULT, Message
from popi.roles import SummaryFormat, SummaryPrompt
from popi.signals import UserSignals
from popi.summary import PreferenceSummary
from popi_inference import LLMSummarizer
from popi_inference.format import PromptedSummary

from .conftest import Models, Ran, at_once

Run = Callable[..., Ran]
Write = Callable[..., Path]


def says(user_id: str, *texts: str) -> dict[str, Any]:
    signals = [{"kind": "statement", "id": f"s{n}", "text": text} for n, text in enumerate(texts)]
    return {"user_id": user_id, "signals": signals}


USERS = [says(f"user-{n}", f"I am user {n}") for n in range(5)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "summaries.jsonl"


@pytest.fixture
def summarize(popi: Run, write_lines: Write, out: Path) -> Run:
    """Summarizes these users, two at a time, into ``out``."""

    def run(users: list[Any], *args: object, model: str = "m") -> Ran:
        signals = write_lines("users.jsonl", *users)
        common = ("--signals", signals, "--model", model, "--out", out, "--max-concurrency", 2)
        return popi("summarize", *common, *args)

    return run


def summaries(path: Path) -> dict[str, PreferenceSummary]:
    found = [PreferenceSummary.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({summary.user_id for summary in found}) == len(found)
    return {summary.user_id: summary for summary in found}


def test_writes_one_summary_a_user(summarize: Run, models: Models, out: Path) -> None:
    ran = summarize(USERS)
    assert ran.code == 0
    assert ran.record == {
        "users": 5,
        "already done": 0,
        "written": 5,
        "of these without evidence": 0,
        "failed": 0,
        "out": str(out),
    }
    written = summaries(out)
    assert list(written) == [user["user_id"] for user in USERS]
    assert written["user-3"].text == "- Short answers"
    assert written["user-3"].claims[0].evidence == ("s0",)
    assert written["user-3"].provenance.signals_digest == UserSignals.model_validate(USERS[3]).digest()
    assert len(models.chats) == 5
    assert models.closed == models.made


def test_leaves_the_settings_beside(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS, "--budget", 100, "--seed", 7)
    meta = json.loads((out.parent / "summaries.jsonl.meta.json").read_text())
    assert meta["settings"] == {
        "model": "m",
        "inference": "llm",
        "max_tokens": 256,
        "temperature": 0.0,
        "budget": 100,
        "seed": 7,
        "language": "auto",
        "attempts": 2,
        "prompts": None,
        "template_hash": DEFAULT.hash,
    }
    assert {"popi", "python"} <= meta["versions"].keys()


def test_a_second_run_does_nothing_and_loads_no_model(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    before = out.read_bytes()
    ran = summarize(USERS)
    assert (ran.code, ran.record["already done"], ran.record["written"]) == (0, 5, 0)
    assert out.read_bytes() == before
    assert len(models.made) == 1


def test_new_users_are_added(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS[:2])
    assert summarize(USERS).record["written"] == 3
    assert len(summaries(out)) == 5
    assert len(models.chats) == 5


def test_takes_examples_as_well_as_bare_signals(summarize: Run, models: Models, out: Path) -> None:
    pair = {"prompt": "How?", "chosen": "So.", "rejected": "Thus."}
    ran = summarize([{"user": USERS[0], "tests": [pair], "oracles": {"truth": "- Likes secrets"}}, USERS[1]])
    assert ran.code == 0
    assert set(summaries(out)) == {"user-0", "user-1"}
    assert not any("secrets" in request.messages[0].content for request in models.chats)


def test_users_without_evidence_are_told_apart(summarize: Run, models: Models, out: Path) -> None:
    ran = summarize([says("silent"), USERS[0]])
    assert (ran.code, ran.record["of these without evidence"]) == (0, 1)
    assert summaries(out)["silent"].status == "not_enough_evidence"
    assert len(models.chats) == 1


def fails_for(number: int) -> Callable[[ChatRequest], str | ChatResult]:
    def answer(request: ChatRequest) -> str | ChatResult:
        if f"I am user {number}" in request.messages[0].content:
            return ChatResult.failed("too long by far", "request", model="m")
        return "- Short answers [1]"

    return answer


def test_a_user_who_fails_is_named_and_tried_again(summarize: Run, models: Models, out: Path) -> None:
    models.answers = fails_for(1)
    ran = summarize(USERS)
    assert ran.code == 1
    assert (ran.record["written"], ran.record["failed"]) == (4, 1)
    assert "popi: no summary of user 'user-1': too long by far\n" in ran.err
    assert ran.err.endswith("popi: 1 of 5 users have no summary; the same command tries them again\n")
    assert "user-1" not in summaries(out)

    models.answers = lambda request: "- Long answers [1]"
    ran = summarize(USERS)
    assert (ran.code, ran.record["written"]) == (0, 1)
    assert summaries(out)["user-1"].text == "- Long answers"
    assert summaries(out)["user-0"].text == "- Short answers"


def test_a_backends_file_is_a_model_whose_costs_are_told(summarize: Run, models: Models, tmp_path: Path) -> None:
    models.answers = lambda request: ChatResult("- Short answers [1]", "stop", 100, 10, "m")
    file = tmp_path / "backend.yaml"
    file.write_text("{backend: transformers, model: m, price: {prompt: 10, completion: 100}}")
    ran = summarize(USERS, model=str(file))
    assert (ran.code, ran.record["written"]) == (0, 5)
    assert ran.err.endswith(
        "popi: 5 requests read 500 tokens and wrote 50: 0.0100\n"
    )  # (5 x 100 x 10 + 50 x 100) / 1e6


def test_a_budget_stops_the_work_before_it_is_passed(summarize: Run, models: Models, out: Path, tmp_path: Path) -> None:
    models.answers = lambda request: ChatResult("- Short answers [1]", "stop", 100, 10, "m")
    file = tmp_path / "backend.yaml"
    # An answer may have 256 tokens and has 10: the third one is more than is left.
    file.write_text("{backend: transformers, model: m, price: {prompt: 0, completion: 10000}, budget: 2.7}")
    ran = summarize(USERS, model=str(file))
    assert ran.code == 1
    assert len(summaries(out)) == len(models.chats) == 2
    assert "popi: 2 requests read 200 tokens and wrote 20: 0.2000\n" in ran.err
    assert ran.err.splitlines()[-1].startswith(
        "popi: the next request might exceed the budget of 2.7, which is for one"
    )
    assert ran.err.endswith(f"finished summaries are kept in {out}, and the same command resumes the run\n")
    assert summarize(USERS, model=str(file)).code == 1
    assert len(summaries(out)) == 4
    assert (summarize(USERS, model=str(file)).code, len(summaries(out))) == (0, 5)


def dies_at(call: int, error: BackendError) -> Callable[[int], Awaitable[None]]:
    async def before(calls: int) -> None:
        if calls == call:
            raise error

    return before


def is_interrupted_after(lines: int, out: Path) -> Callable[[int], Awaitable[None]]:
    """As by Ctrl-C, once there are so many summaries."""

    async def before(calls: int) -> None:
        if calls >= lines:
            while not out.exists() or len(summaries(out)) < lines:
                await asyncio.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)

    return before


@pytest.mark.parametrize("how", ["dies", "is interrupted"])
def test_what_was_finished_before_the_end_is_kept(how: str, summarize: Run, models: Models, out: Path) -> None:
    models.before = dies_at(2, BackendError("out of memory")) if how == "dies" else is_interrupted_after(2, out)
    ran = summarize(USERS)
    assert ran.code == (1 if how == "dies" else 130)
    assert ran.err.splitlines()[-1] == (
        f"popi: {'out of memory' if how == 'dies' else 'interrupted'}; "
        f"finished summaries are kept in {out}, and the same command resumes the run"
    )
    kept = set(summaries(out))
    assert {"user-0", "user-1"} <= kept < {user["user_id"] for user in USERS}
    assert models.closed == models.made

    models.before, models.answers = at_once, lambda request: "- Long answers [1]"
    assert summarize(USERS).record["already done"] == len(kept)
    assert {name for name, summary in summaries(out).items() if summary.text == "- Short answers"} == kept
    assert len(summaries(out)) == 5


def test_a_summary_is_on_the_disk_before_the_next_user_has_a_turn(summarize: Run, models: Models, out: Path) -> None:
    """A slow user holds up nobody, and the others are written while it is running."""
    seen = []

    async def before(calls: int) -> None:
        while calls == 0 and len(seen) < 4:
            await asyncio.sleep(0.001)
            seen[:] = summaries(out) if out.exists() else []

    models.before = before
    assert summarize(USERS).code == 0
    assert seen == ["user-1", "user-2", "user-3", "user-4"]
    assert list(summaries(out)) == [*seen, "user-0"]


def test_a_request_that_is_lost_does_not_end_the_run(summarize: Run, models: Models, out: Path) -> None:
    models.before = dies_at(1, BackendError("connection reset", failure="unreachable"))
    ran = summarize(USERS)
    assert (ran.code, ran.record["written"], ran.record["failed"]) == (1, 4, 1)
    assert "popi: no summary of user 'user-1': connection reset\n" in ran.err
    models.before = at_once
    assert summarize(USERS).record["written"] == 1


def test_a_server_that_is_not_there_is_one_error(summarize: Run, models: Models, out: Path) -> None:
    async def before(calls: int) -> None:
        raise BackendError("connection refused", failure="unreachable")

    models.before = before
    ran = summarize([says(f"user-{n}", f"I am user {n}") for n in range(100)])
    assert ran.code == 1
    assert [line for line in ran.err.splitlines() if "refused" in line] == [
        f"popi: connection refused; finished summaries are kept in {out}, and the same command resumes the run"
    ]
    assert len(models.made[0].chats) == 0 and models.made[0].calls <= 10  # type: ignore[attr-defined]


def test_an_incomplete_line_is_removed_and_done_again(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    whole = out.read_bytes()
    out.write_bytes(whole[:-100])
    ran = summarize(USERS)
    assert (ran.code, ran.record["written"]) == (0, 1)
    assert f"popi: removed an incomplete line at the end of {out}\n" in ran.err
    assert len(summaries(out)) == 5


def test_changed_signals_are_summarized_anew(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    models.answers = lambda request: "- Rhymes [1]"
    ran = summarize([*USERS[:2], says("user-2", "I am user 2", "I love rhymes"), *USERS[3:]])
    assert (ran.code, ran.record["written"]) == (0, 1)
    texts = {user_id: summary.text for user_id, summary in summaries(out).items()}
    assert texts == {user["user_id"]: "- Short answers" for user in USERS} | {"user-2": "- Rhymes"}


def test_an_old_summary_is_not_lost_when_no_new_one_can_be_had(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    models.answers = fails_for(2)
    changed = [says("user-2", "I am user 2", "I love rhymes")]
    assert summarize(changed).code == 1
    assert summaries(out)["user-2"].text == "- Short answers"
    models.before = dies_at(0, BackendError("gone"))
    assert summarize(changed).code == 1
    assert summaries(out)["user-2"].text == "- Short answers"


def test_a_persons_edit_stays(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    edited = {**summaries(out), "user-2": summaries(out)["user-2"].edit("- As I say myself")}
    out.write_text("".join(f"{summary.model_dump_json()}\n" for summary in edited.values()), encoding="utf-8")
    ran = summarize([*USERS[:2], says("user-2", "something else")])
    assert (ran.code, ran.record["written"]) == (0, 0)
    assert "1 edited summaries are kept, although their signals have changed" in ran.err
    assert summaries(out)["user-2"].text == "- As I say myself"


@pytest.mark.parametrize(
    ("args", "model", "says"),
    [
        (["--budget", 50], "m", "was made with budget None, not 50"),
        (["--inference", "raw"], "m", "was made with inference 'llm', not 'raw'"),
        ([], "other", "was made with model 'm', not 'other'"),
    ],
)
def test_a_file_made_with_other_settings_is_refused(
    args: list[object], model: str, says: str, summarize: Run, models: Models, out: Path
) -> None:
    summarize(USERS)
    before = out.read_bytes()
    ran = summarize([*USERS, says_more()], *args, model=model)
    assert ran.code == 2
    assert ran.err == f"popi: {out}: {says}; give the same options, or name another file with --out\n"
    assert out.read_bytes() == before


def test_an_empty_reply_is_a_failed_user_and_not_a_lack_of_evidence(summarize: Run, models: Models, out: Path) -> None:
    models.answers = lambda request: "" if "I am user 1" in request.messages[0].content else "- Short answers [1]"
    ran = summarize(USERS)
    assert (ran.code, ran.record["failed"], ran.record["of these without evidence"]) == (1, 1, 0)
    assert "popi: no summary of user 'user-1': the response is empty: the model wrote no text\n" in ran.err
    assert len(summaries(out)) == 4


def test_a_reply_that_is_no_summary_is_requested_again(summarize: Run, models: Models, out: Path) -> None:
    replies = iter(["yes " * 90] * 3)
    models.answers = lambda request: next(replies, "- Short answers [1]")
    assert summarize(USERS[:1]).code == 0
    assert len({request.seed for request in models.chats}) == len(models.chats) == 4
    assert summaries(out)["user-0"].text == "- Short answers"
    models.answers = lambda request: "yes " * 90
    ran = summarize(USERS[:2])
    assert (ran.code, ran.record["failed"], len(models.chats)) == (1, 1, 8)


def test_options_reach_the_writer(summarize: Run, models: Models, out: Path) -> None:
    assert summarize(USERS[:1], "--language", "German", "--temperature", 0.5, "--max-tokens", 30).code == 0
    [request] = models.chats
    assert (request.temperature, request.max_tokens) == (0.5, 30)
    assert "Write the list in German." in request.messages[0].content
    ran = summarize(USERS[:1], "--prompt-set", "defualt")
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_a_prompt_set_in_a_file_is_used_and_recorded(summarize: Run, models: Models, out: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("name: own\ninfer: |-\n  {open}\n  {signals}\n  {close}\n  What do they like?\n")
    assert summarize(USERS[:1], "--prompt-set", file).code == 0
    assert models.chats[0].messages[-1].content.endswith("What do they like?")
    assert summaries(out)["user-0"].provenance.template_hash.startswith("custom-")
    file.write_text(file.read_text().replace("like", "want"))
    ran = summarize(USERS, "--prompt-set", file)
    assert ran.code == 2 and "template_hash" in ran.err and len(summaries(out)) == 1
    file.write_text("name: own\ninfer: Hello.\n")
    ran = summarize(USERS, "--prompt-set", file)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert f"{file}, field infer: lacks the placeholder {{close}}; add {{close}}" in ran.err


BAD = [USERS[0], '{"user_id": "x", "signals": [{"kind": "statement"}]}', "{half", USERS[1]]


def test_bad_rows_are_reported_together(summarize: Run, models: Models, out: Path) -> None:
    ran = summarize([*BAD, *["{half"] * 12])
    assert ran.code == 2
    first, *others = ran.err.splitlines()
    assert "14 bad rows; the first: line 2, field signals.0.text: field required" in first
    assert "--skip-bad-rows" in first
    assert len(others) == 10 and ":3: is not JSON" in others[0] and others[-1] == "popi: ... and 4 more"
    assert models.made == [] and not out.exists()


def test_bad_rows_can_be_skipped(summarize: Run, models: Models, out: Path) -> None:
    ran = summarize(BAD, "--skip-bad-rows")
    assert (ran.code, ran.record["users"], ran.record["written"]) == (0, 2, 2)
    assert "popi: skipped 2 bad rows; the first: " in ran.err
    assert ":2, field signals.0.text: field required\n" in ran.err
    assert list(summaries(out)) == ["user-0", "user-1"]
    ran = summarize(BAD[1:3], "--skip-bad-rows")
    assert (ran.code, ran.err.splitlines()[0].endswith("all rows are bad; check the format of the file")) == (2, True)


class OwnFormat(PromptedSummary):
    """Other words than the default's."""

    words = "Summarize: "

    @property
    def template_hash(self) -> str:
        return SummaryFormat.template_hash.fget(self)  # type: ignore[attr-defined]

    def render(self, user: UserSignals) -> SummaryPrompt | None:
        prompt = super().render(user)
        return prompt and replace(prompt, messages=(Message("user", self.words + prompt.messages[0].content),))


class OwnWriter(LLMSummarizer):
    def __init__(self, backend: Backend) -> None:
        super().__init__(backend, format=OwnFormat(backend.count_tokens, budget=100, max_tokens=50))


def test_a_writer_of_ones_own_is_known_by_its_templates(
    summarize: Run, models: Models, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("--inference", f"{__name__}:OwnWriter")
    assert summarize(USERS[:2], *own).code == 0
    assert models.chats[0].messages[0].content.startswith("Summarize: Signals of one user")
    monkeypatch.setattr(OwnFormat, "words", "Tell: ")
    ran = summarize(USERS, *own)
    assert ran.code == 2
    assert "was made with template_hash 'custom-" in ran.err
    assert len(summaries(out)) == 2


@pytest.mark.parametrize("option", ["--signals", "--model", "--out"])
@pytest.mark.parametrize("kind", ["folder", "binary", "gguf", "safetensors", "json", "yaml", "pipe"])
def test_a_path_of_another_kind_is_one_line(
    option: str, kind: str, popi: Run, write_lines: Write, tmp_path: Path
) -> None:
    path = tmp_path / (kind if kind in ("folder", "pipe") else f"file.{kind}")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"\x93GGUF\x00\xff\n" if kind in ("binary", "gguf", "safetensors") else b"[1, 2]\n")
    before = None if kind in ("folder", "pipe") else path.read_bytes()
    paths = {
        "--signals": write_lines("users.jsonl", USERS[0]),
        "--model": "popi-mini-writer",
        "--out": tmp_path / "out.jsonl",
    }
    ran = popi("summarize", *(word for pair in (paths | {option: path}).items() for word in pair))
    assert ran.code == 2
    assert str(path) in ran.err
    assert all(len(line) < 400 and "Traceback" not in line for line in ran.err.splitlines())
    assert ran.err.count("\n") == 1
    assert before is None or path.read_bytes() == before
    if (option, kind) == ("--model", "gguf"):
        assert "is not a GGUF file, or damaged" in ran.err


def says_more() -> dict[str, Any]:
    return says("one more", "hello")


def test_summaries_of_another_model_or_other_templates_are_refused(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    meta = out.parent / "summaries.jsonl.meta.json"
    meta.unlink()
    assert "is by 'm', not by 'other'" in summarize([*USERS, says_more()], model="other").err
    out.write_text(out.read_text().replace(DEFAULT.hash, "0" * 12))
    ran = summarize(USERS)
    assert ran.code == 2
    assert f"{out}:1 was made with prompt templates 000000000000" in ran.err


@pytest.mark.parametrize(
    ("users", "says"),
    [
        (
            [USERS[0], '{"user_id": "x", "signals": [{"kind": "statement"}]}'],
            ":2, field signals.0.text: field required",
        ),
        ([USERS[0], "{half"], ":2: is not JSON"),
        ([USERS[0], USERS[0]], ":2, field user_id: user 'user-0' is already in line 1"),
    ],
)
def test_broken_signals_are_found_before_any_work(
    users: list[Any], says: str, summarize: Run, models: Models, out: Path
) -> None:
    ran = summarize(users)
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert models.made == []
    assert not out.exists()


def test_options_that_make_no_sense_are_refused_before_any_work(summarize: Run, models: Models) -> None:
    for args, message in [
        (["--inference", "lm"], "did you mean llm?"),
        (["--inference", "empty", "--budget", 5], "'empty' has no option 'budget'"),
        (["--inference", "another-user"], "'another-user' needs the option 'inner'"),
        (["--budget", 0], "greater than or equal to 1"),
    ]:
        ran = summarize(USERS, *args)
        assert ran.code == 2
        assert message in ran.err
        assert ran.err.count("\n") == 1
    assert models.made == []


def test_missing_signals_are_one_line(popi: Run, models: Models, out: Path) -> None:
    ran = popi("summarize", "--signals", "no/such.jsonl", "--model", "m", "--out", out)
    assert ran.code == 2
    assert ran.err == "popi: no/such.jsonl: cannot be read (No such file or directory); check the path\n"


def test_a_mistyped_model_does_not_bind_the_next_command(
    summarize: Run, models: Models, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ModelError(f"no model {name!r}")

    with monkeypatch.context() as patched:
        patched.setattr("popi.personalizer.open_backend", fail)
        assert summarize(USERS, model="mistyped").code == 2
    assert summarize(USERS, model="m").code == 0


def test_a_pipe_is_refused_because_it_is_read_twice(popi: Run, models: Models, out: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ran = popi("summarize", "--signals", pipe, "--model", "m", "--out", out)
    assert ran.code == 2
    assert ran.err == f"popi: {pipe}: is not a regular file, but is read twice; save its content to a file first\n"


def test_settings_that_gave_nothing_bind_nobody(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS, "--seed", 7)
    out.write_text("")
    assert summarize(USERS, "--seed", 8).code == 0
    assert json.loads((out.parent / "summaries.jsonl.meta.json").read_text())["settings"]["seed"] == 8


def test_no_two_at_once(summarize: Run, models: Models, out: Path) -> None:
    with GrowingFile(out):
        ran = summarize(USERS)
    assert ran.code == 1
    assert ran.err == f"popi: {out} is being written by another process; wait for it or choose another path\n"


def test_a_full_disk_is_one_line_and_keeps_whole_lines(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS[:1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 800, hard))
    try:
        ran = summarize(USERS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith(f"popi: cannot write {out}: File too large; finished summaries are kept")
    assert 1 <= len(summaries(out)) < 5
    assert summarize(USERS).code == 0
    assert len(summaries(out)) == 5


def test_a_large_file_of_users_is_not_read_into_memory(
    popi: Run, write_lines: Write, models: Models, out: Path
) -> None:
    signals = write_lines("users.jsonl", *(says(f"user-{n}", f"{n} {'x' * 20_000}") for n in range(300)))
    args = ("--signals", signals, "--model", "m", "--inference", "empty", "--max-concurrency", 10, "--out")
    popi("summarize", *args, out.with_name("first.jsonl"))  # so that imports do not count
    tracemalloc.start()
    try:
        ran = popi("summarize", *args, out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (ran.code, ran.record["written"]) == (0, 300)
    assert peak < signals.stat().st_size / 3
