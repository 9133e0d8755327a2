from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from popi.data.miniworld import generate
from popi.signals import Statement, UserSignals
from popi.summary import PreferenceSummary

from .conftest import Ran

USERS = 24


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.jsonl"
    people = (example.user for example in generate(split="train", users=USERS, seed=0))
    path.write_text("".join(f"{person.model_dump_json()}\n" for person in people))
    return path


def _listen_to_ctrl_c():
    """A suite in the background of a shell ignores the signal, and so would every process that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_midway(args: list[str], out: Path, lines: int, number: signal.Signals) -> tuple[int, str]:
    """Runs a command and sends it a signal once a file has some lines; its exit code and error stream."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "popi", *args]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=_listen_to_ctrl_c
    ) as process:
        while process.poll() is None and whole_lines(out) < lines:
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate()
    return process.returncode, errors


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def texts(out: Path) -> dict[str, str]:
    lines = out.read_text(encoding="utf-8").splitlines()
    found = [PreferenceSummary.model_validate_json(line) for line in lines]
    assert len({summary.user_id for summary in found}) == len(found)
    return {summary.user_id: summary.text for summary in found}


@pytest.mark.slow
def test_after_kill_9_and_ctrl_c_the_same_command_ends_as_if_it_had_never_stopped(
    popi: Callable[..., Ran], users: Path, tmp_path: Path
) -> None:
    def command(out: Path) -> list[str]:
        options = ["--max-concurrency", "2", "--max-tokens", "48"]
        return ["summarize", "--signals", str(users), "--model", "popi-mini-writer", "--out", str(out), *options]

    out, straight = tmp_path / "stopped.jsonl", tmp_path / "straight.jsonl"
    code, _ = stop_midway(command(out), out, 4, signal.SIGKILL)
    assert code == -signal.SIGKILL
    killed = whole_lines(out)
    assert 4 <= killed < USERS
    with out.open("ab") as file:
        file.write(b'{"user_id": "user-23", "te')

    code, errors = stop_midway(command(out), out, killed + 2, signal.SIGINT)
    assert code == 130
    assert errors.splitlines()[0] == f"popi: removed an incomplete line at the end of {out}"
    assert errors.splitlines()[-1].startswith("popi: interrupted; finished summaries are kept in")
    assert "Traceback" not in errors

    interrupted = len(texts(out))
    assert killed < interrupted < USERS
    ran = popi(*command(out))
    assert (ran.code, ran.record["already done"], ran.record["written"]) == (0, interrupted, USERS - interrupted)
    assert popi(*command(straight)).code == 0
    assert texts(out) == texts(straight)

    # New signals of half of the users, and the same again for new summaries in the places of old ones.
    people = [UserSignals.model_validate_json(line) for line in users.read_text().splitlines()]
    changed = [
        person.add(Statement(text="I like tables.")) if place % 2 else person for place, person in enumerate(people)
    ]
    users.write_text("".join(f"{person.model_dump_json()}\n" for person in changed))
    changes = out.with_name(f".{out.name}.changes")
    assert stop_midway(command(out), changes, 3, signal.SIGKILL)[0] == -signal.SIGKILL
    assert texts(out) == texts(straight)
    made = whole_lines(changes)
    ran = popi(*command(out))
    assert (ran.code, ran.record["written"]) == (0, USERS // 2 - made)
    assert texts(out).keys() == texts(straight).keys()
    assert popi(*command(straight)).code == 0
    assert texts(out) == texts(straight)
