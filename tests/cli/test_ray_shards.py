"""Folders of summaries on Ray: the same files, results and errors as without it, also when a worker is killed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from popi.cli import ray_worker
from popi.cli.ray_worker import ATTEMPTS, Tally, Worker
from popi.cli.shards import find_shards
from popi.cli.summaries import SummaryWriter
from popi.errors import InputError, LockedError, PopiError
from popi.io import lock

from .conftest import Models, Ran
from .test_shards import summaries, summaries_so_far, user, write_shards


class Handle:
    """The handle of an actor in this process."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        class Method:
            remote = staticmethod(getattr(self._actor, name))

        return Method


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> Tally:
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.setattr(ray, "get", lambda value: value)
    return Tally()


@pytest.fixture
def worker(tally: Tally, models: Models, tmp_path: Path) -> Worker:
    write_shards(tmp_path / "in", 2, 3)
    settings = {"model": "m", "inference": "llm"}
    shards = find_shards(tmp_path / "in", tmp_path / "out")
    return Worker(Handle(tally), shards, partial(SummaryWriter.load, settings, {}, 8), settings, False)


def outcome(worker: Worker, place: int = 0) -> Any:
    return pickle.loads(worker({"place": place})["outcome"])


def test_a_worker_loads_the_model_once_and_reports_users_and_notes(
    worker: Worker, tally: Tally, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [outcome(worker, place)["written"] for place in (0, 1)] == [3, 3]
    assert len(models.made) == 1 and len(models.chats) == 6
    assert tally.take() == (6, [f"finished part-0{place}.jsonl: 3 written, 0 failed\n" for place in (0, 1)])
    assert tally.take() == (0, [])
    assert capsys.readouterr().err == ""


def test_the_error_of_a_shard_is_its_outcome(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "in" / "part-00.jsonl").write_text("{\n")
    error = outcome(worker)
    assert isinstance(error, InputError) and error.exit_code == 2
    assert str(error).startswith(f"{tmp_path / 'in' / 'part-00.jsonl'}:1: is not JSON")


def test_workers_that_die_in_a_shard_again_and_again_end_the_command(worker: Worker, tally: Tally) -> None:
    for _ in range(ATTEMPTS - 1):
        tally.begin(0)
    assert outcome(worker)["written"] == 3
    assert "a worker died in part-00.jsonl; another one continues it\n" in tally.take()[1]
    error = outcome(worker)
    assert isinstance(error, PopiError) and f"{ATTEMPTS} workers died in" in str(error)
    assert outcome(worker, 1)["written"] == 3


def test_a_shard_that_stays_locked_is_an_error(worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_worker, "PATIENCE", 0.0)
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out" / "part-00.jsonl"):
        assert isinstance(outcome(worker), LockedError)
    assert outcome(worker)["written"] == 3


def summarize(popi: Callable[..., Ran], folder: Path, *args: object) -> Ran:
    return popi("summarize", "--signals", folder / "in", "--model", "m", "--out", folder / "out", *args)


@pytest.mark.parametrize("option", ["--workers", "--gpus-per-worker"])
def test_options_of_workers_need_ray(popi: Callable[..., Ran], tmp_path: Path, option: str) -> None:
    write_shards(tmp_path / "in", 1, 1)
    ran = summarize(popi, tmp_path, option, 2)
    assert ran.code == 2 and f"field {option}: is for workers of Ray; add --ray local" in ran.err


def test_ray_needs_a_folder_a_cluster_and_the_extra(
    popi: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_text(json.dumps(user(1)) + "\n")
    assert "field --ray: is for a folder of shards; name" in summarize(popi, tmp_path, "--ray", "local").err
    (tmp_path / "in").unlink()
    write_shards(tmp_path / "in", 1, 1)
    if "ray" in sys.modules or pytest.importorskip("ray", reason="needs the extra ray"):
        for address in ("127.0.0.1:1", "nowhere"):
            ran = summarize(popi, tmp_path, "--ray", address)
            assert ran.code == 2 and f"field --ray: cannot connect to '{address}'" in ran.err
    monkeypatch.delitem(sys.modules, "popi.cli.ray_shards", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = summarize(popi, tmp_path, "--ray", "local")
    assert ran.code == 2 and "ray is not installed; install it with: pip install 'popi[ray]'" in ran.err


def command(folder: Path, *words: str) -> list[str]:
    common = ["--signals", str(folder / "in"), "--out", str(folder / "out")]
    return [sys.executable, "-m", "popi", "summarize", *common, *words]


ON_RAY = ("--ray", "local", "--workers", "2")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::MapWorker"):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_a_killed_worker_loses_no_user_and_repeats_none(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    write_shards(tmp_path / "in", 4, 40)
    words = command(tmp_path, "--model", "popi-mini-base", "--max-tokens", "24", *ON_RAY)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(summaries_so_far(tmp_path / "out")) < 10:
        time.sleep(0.01)
    workers = workers_of(process)
    assert len(workers) == 2
    for killed in workers:
        killed.kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode in (0, 1), err
    record = json.loads(out)
    assert (record["shards"], record["users"]) == (4, 160)
    assert "another one continues it" in err
    # Nothing of Ray is among them.
    assert all(line.startswith("popi: ") for line in err.splitlines()), err
    found = summaries(tmp_path / "out")
    assert len(found) == len(set(found)) == 160 - record["failed"] > 0
    assert len(list((tmp_path / "out").glob("*.manifest.json"))) == 4


@pytest.mark.slow
def test_a_locked_shard_is_waited_for_and_a_bad_row_is_the_same_error(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    write_shards(tmp_path / "in", 2, 3)
    here = command(tmp_path, "--model", "popi-mini-base", "--inference", "empty")
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out" / "part-00.jsonl"):
        process = subprocess.Popen([*here, *ON_RAY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (tmp_path / "out" / "part-01.manifest.json").exists():
            time.sleep(0.1)
        assert not (tmp_path / "out" / "part-00.jsonl").exists()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["written"] == 6 and sorted(summaries(tmp_path / "out")) == [f"user-{n}" for n in range(6)]
    with (tmp_path / "in" / "part-01.jsonl").open("a") as file:
        file.write("{\n[]\n")
    without, on_ray = (
        subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        for words in (here, [*here, *ON_RAY])
    )
    assert (without.returncode, on_ray.returncode) == (2, 2)
    errors = without.stderr.splitlines()
    assert len(errors) == 2 and on_ray.stderr.splitlines()[-2:] == errors
    assert "part-01.jsonl" in errors[0] and not on_ray.stdout
