"""Summaries of folders: each shard once, one summary per user, whatever stops the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.summary import PreferenceSummary

from .conftest import Models, Ran

Run = Callable[..., Ran]


def user(number: int) -> dict[str, Any]:
    return {"user_id": f"user-{number}", "signals": [{"kind": "statement", "text": f"I am user {number}"}]}


def write_shards(folder: Path, shards: int, users: int) -> None:
    for shard in range(shards):
        path = folder / f"part-{shard:02d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = range(shard * users, (shard + 1) * users)
        path.write_text("".join(json.dumps(user(number)) + "\n" for number in numbers))


def summaries(folder: Path) -> list[str]:
    """The users of all summaries in a folder, in order."""
    return [
        PreferenceSummary.model_validate_json(line).user_id
        for file in sorted(folder.rglob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]


@pytest.fixture
def run(popi: Run, tmp_path: Path) -> Run:
    def summarize(*args: object) -> Ran:
        common = ("--signals", tmp_path / "in", "--model", "m", "--out", tmp_path / "out")
        return popi("summarize", *common, *args)

    return summarize


def test_each_shard_has_its_summaries_and_a_manifest(run: Run, models: Models, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 3, 4)
    write_shards(tmp_path / "in" / "more", 1, 2)
    (tmp_path / "in" / ".hidden").mkdir()
    (tmp_path / "in" / ".hidden" / "part.jsonl").write_text("no user")
    ran = run()
    assert ran.code == 0, ran.err
    assert ran.record == {
        "shards": 4,
        "users": 14,
        "already done": 0,
        "written": 14,
        "of these without evidence": 0,
        "failed": 0,
        "out": str(tmp_path / "out"),
    }
    assert sorted(summaries(tmp_path / "out")) == sorted([f"user-{n}" for n in range(12)] + ["user-0", "user-1"])
    manifest = json.loads((tmp_path / "out" / "part-01.manifest.json").read_text())
    assert (manifest["report"]["written"], manifest["users_failed"], manifest["failures"]) == (4, 0, {})
    assert manifest["settings"]["model"] == "m" and len(manifest["settings"]["template_hash"]) == 12
    assert manifest["summary_tokens"] > 0 and manifest["seconds"] >= 0 and "popi" in manifest["versions"]
    assert (tmp_path / "out" / "more" / "part-00.jsonl").exists()


def test_finished_shards_are_skipped_and_changed_ones_are_not(run: Run, models: Models, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 3, 2)
    assert run().code == 0
    assert run().record["written"] == 6 and len(models.chats) == 6
    with (tmp_path / "in" / "part-01.jsonl").open("a") as file:
        file.write(json.dumps(user(99)) + "\n")
    assert run().code == 0
    assert len(models.chats) == 7 and summaries(tmp_path / "out").count("user-99") == 1
    (tmp_path / "out" / "part-02.jsonl").unlink()
    assert run().code == 0
    assert len(models.chats) == 9 and len(set(summaries(tmp_path / "out"))) == 7


def test_failures_are_counted_by_reason_and_tried_again(run: Run, models: Models, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 2, 3)

    failed = ChatResult("", "error", error="out of luck", failure="request")

    def answer(request: ChatRequest) -> str | ChatResult:
        fails = "user 4" in request.messages[-1].content
        return failed if fails else "- Short answers [1]"

    models.answers = answer
    ran = run()
    assert ran.code == 1 and "1 of 6 users have no summary; the same command tries them again" in ran.err
    manifest = json.loads((tmp_path / "out" / "part-01.manifest.json").read_text())
    assert manifest["failures"] == {"out of luck": 1} and manifest["users_failed"] == 1
    models.answers = lambda request: "- Long answers [1]"
    before = len(models.chats)
    assert run().code == 0
    assert len(models.chats) == before + 1 and sorted(summaries(tmp_path / "out")) == [f"user-{n}" for n in range(6)]


def test_processes_divide_the_shards(run: Run, models: Models, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 5, 2)
    for place in (1, 2, 3):
        assert run("--shard", f"{place}/3").code == 0
    assert sorted(summaries(tmp_path / "out")) == sorted(f"user-{n}" for n in range(10))
    assert len(models.chats) == 10


@pytest.mark.parametrize("where", ["in", "in/out", "in/../in/out"])
def test_summaries_are_not_written_among_the_signals(popi: Run, models: Models, tmp_path: Path, where: str) -> None:
    write_shards(tmp_path / "in", 1, 2)
    before = (tmp_path / "in" / "part-00.jsonl").read_bytes()
    ran = popi("summarize", "--signals", tmp_path / "in", "--model", "m", "--out", tmp_path / where)
    assert ran.code == 2 and "is in the folder of the signals" in ran.err
    assert (tmp_path / "in" / "part-00.jsonl").read_bytes() == before and not models.chats


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "1/0", "one/two"])
def test_a_part_that_is_none_is_refused(run: Run, tmp_path: Path, part: str) -> None:
    write_shards(tmp_path / "in", 1, 1)
    ran = run("--shard", part)
    assert ran.code == 2 and f"field --shard: invalid shard '{part}'; write I/N with I from 1 to N" in ran.err


def test_folders_without_shards_and_parts_of_a_file_are_refused(popi: Run, run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "contains no .jsonl or .parquet files; name the folder of the shards" in run().err
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(user(1)) + "\n")
    ran = popi("summarize", "--signals", tmp_path / "in" / "a.jsonl", "--model", "m", "--out", "o", "--shard", "1/2")
    assert ran.code == 2 and "field --shard: is for a folder of shards" in ran.err


def test_a_bad_row_names_its_shard_and_earlier_shards_are_kept(run: Run, models: Models, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 2, 2)
    with (tmp_path / "in" / "part-01.jsonl").open("a") as file:
        file.write("{\n")
    ran = run()
    assert ran.code == 2 and f"{tmp_path / 'in' / 'part-01.jsonl'}" in ran.err
    assert summaries(tmp_path / "out") == ["user-0", "user-1"]
    assert run("--skip-bad-rows").code == 0
    assert summaries(tmp_path / "out") == [f"user-{n}" for n in range(4)]


def test_parquet_is_read_as_json_lines_are(run: Run, models: Models, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra parquet")
    from pyarrow import parquet

    rows = [user(0), {"user_id": "user-1", "signals": [{"kind": "comment", "text": "No.", "about": "Yes?"}]}]
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    assert run().code == 0
    assert summaries(tmp_path / "out") == ["user-0", "user-1"]
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(user(1)) + "\n")
    assert "exists with two endings; remove one of the files" in run().err
    (tmp_path / "in" / "a.jsonl").unlink()
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 no parquet")
    ran = run()
    assert ran.code == 2 and f"{tmp_path / 'in' / 'b.parquet'}: cannot be read" in ran.err


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_writes_each_user_once(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", 4, 30)
    words = ["summarize", "--signals", str(tmp_path / "in"), "--model", "popi-mini-writer", "--max-tokens", "24"]
    command = [sys.executable, "-m", "popi", *words, "--out", str(tmp_path / "out")]
    for wanted in (5, 40, 70):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(summaries_so_far(tmp_path / "out")) < wanted:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode in (0, 1), ended.stderr
    failed = json.loads(ended.stdout)["failed"]
    found = summaries(tmp_path / "out")
    assert len(found) == len(set(found)) == 120 - failed
    assert len(list((tmp_path / "out").glob("*.manifest.json"))) == 4


def summaries_so_far(folder: Path) -> list[bytes]:
    return [line for file in folder.rglob("*.jsonl") for line in file.read_bytes().splitlines()]
