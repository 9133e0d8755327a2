from __future__ import annotations

import json
import os
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.cli.growing import GrowingFile
from popi.errors import BackendError, ModelError
from popi.prompts import DEFAULT
from popi.signals import UserSignals
from popi.summary import PreferenceSummary

from .conftest import Models, Ran

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
        common = ("--signals", signals, "--model", model, "--out", out, "--batch-size", 2)
        return popi("summarize", *common, *args)

    return run


def summaries(path: Path) -> dict[str, PreferenceSummary]:
    found = [PreferenceSummary.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({summary.user_id for summary in found}) == len(found)
    return {summary.user_id: summary for summary in found}


def test_writes_one_summary_a_user_in_batches(summarize: Run, models: Models, out: Path) -> None:
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
    [backend] = models.made
    assert backend.batches == 3  # type: ignore[attr-defined]
    assert models.closed == [backend]


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
            return ChatResult("", "error", error="too long by far")
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
    assert ran.err.splitlines()[-1].startswith("popi: the next request might pass the budget of 2.7, which is for one")
    assert ran.err.endswith(f"what is finished is kept in {out}, and the same command goes on\n")
    assert summarize(USERS, model=str(file)).code == 1
    assert len(summaries(out)) == 4
    assert (summarize(USERS, model=str(file)).code, len(summaries(out))) == (0, 5)


def raise_at(batch: int, error: BaseException) -> Callable[[int], None]:
    def before(batches: int) -> None:
        if batches == batch:
            raise error

    return before


@pytest.mark.parametrize(
    ("error", "code", "says_first"),
    [(BackendError("out of memory"), 1, "popi: out of memory; "), (KeyboardInterrupt(), 130, "popi: interrupted; ")],
)
def test_what_was_finished_before_the_end_is_kept(
    error: BaseException, code: int, says_first: str, summarize: Run, models: Models, out: Path
) -> None:
    models.before = raise_at(1, error)
    ran = summarize(USERS)
    assert ran.code == code
    assert ran.err.splitlines()[-1].startswith(says_first)
    assert f"kept in {out}, and the same command goes on" in ran.err
    assert list(summaries(out)) == ["user-0", "user-1"]
    assert models.closed == models.made

    models.before = lambda batches: None
    assert summarize(USERS).record["already done"] == 2
    assert len(summaries(out)) == 5
    assert len(models.chats) == 5


def test_half_a_line_is_dropped_and_done_again(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    whole = out.read_bytes()
    out.write_bytes(whole[:-100])
    ran = summarize(USERS)
    assert (ran.code, ran.record["written"]) == (0, 1)
    assert "ended in half a line, which was dropped" in ran.err
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
    models.before = raise_at(0, BackendError("gone"))
    assert summarize(changed).code == 1
    assert summaries(out)["user-2"].text == "- Short answers"


def test_a_persons_edit_stays(summarize: Run, models: Models, out: Path) -> None:
    summarize(USERS)
    edited = {**summaries(out), "user-2": summaries(out)["user-2"].edit("- As I say myself")}
    out.write_text("".join(f"{summary.model_dump_json()}\n" for summary in edited.values()), encoding="utf-8")
    ran = summarize([*USERS[:2], says("user-2", "something else")])
    assert (ran.code, ran.record["written"]) == (0, 0)
    assert "1 edited summaries are kept although the signals have changed since" in ran.err
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
    assert ran.err == f"popi: {out}: {says}; give the same options or another --out\n"
    assert out.read_bytes() == before


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
        (["--inference", "another-user"], "cannot be made without 'inner'"),
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
    def fail(name: str, role: str) -> None:
        raise ModelError(f"no model {name!r}")

    with monkeypatch.context() as patched:
        patched.setattr("popi.cli.batches.load_backend", fail)
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
    assert ran.err.splitlines()[-1].startswith(f"popi: cannot write {out}: File too large; what is finished is kept")
    assert 1 <= len(summaries(out)) < 5
    assert summarize(USERS).code == 0
    assert len(summaries(out)) == 5


def test_a_large_file_of_users_is_not_read_into_memory(
    popi: Run, write_lines: Write, models: Models, out: Path
) -> None:
    signals = write_lines("users.jsonl", *(says(f"user-{n}", f"{n} {'x' * 20_000}") for n in range(300)))
    args = ("--signals", signals, "--model", "m", "--inference", "empty", "--batch-size", 10, "--out")
    popi("summarize", *args, out.with_name("first.jsonl"))  # so that imports do not count
    tracemalloc.start()
    try:
        ran = popi("summarize", *args, out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (ran.code, ran.record["written"]) == (0, 300)
    assert peak < signals.stat().st_size / 3
