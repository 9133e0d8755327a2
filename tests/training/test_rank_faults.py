"""Whatever ends a run of two ranks: one line says what happened, no rank is left, and the next start resumes it."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from popi.config import load
from popi.training.checkpoints import last_complete
from tests.training.rank_faults import full_disk, hang, kill, lines_of_popi, nan_logit, slow, start
from tests.training.rank_runs import environment, make_inputs, same_weights, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def recipe(folder):
    tree = make_inputs(folder)

    def make(kind, **changes):
        file = folder / f"{kind}.yaml"
        resolved = load(write_recipe(file, tree), {"engine.kind": kind, "steps": 4, **changes})
        return write_recipe(file, resolved.model_dump(mode="json"))

    return make


def failed(run, seconds=60):
    """The only line of a run that failed in the middle, apart from the report of torchrun."""
    said, after = run.ended()
    assert run.launcher.returncode == 1
    assert run.mark.exists() and after < seconds
    # The ranks mark the lines of their tracebacks.
    assert "[rank" not in said and said.count("Traceback") == 1, said
    assert not (run.out / "writer").exists()
    *notes, line = lines_of_popi(said)
    assert all("resuming from" in note for note in notes), said
    return line


def finished(run):
    """The notes of a run that ended as it should."""
    said, _ = run.ended()
    assert run.launcher.returncode == 0, said
    return [line for line in lines_of_popi(said) if "tiny" not in line.split(":")[1]]


def damaged_copies(phase, to):
    """Copies of a phase. In each, one file of the newest checkpoint is truncated or removed."""
    newest = last_complete(phase)
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for left in (None, b"", content[: len(content) // 2]):
            shutil.copytree(phase, to, copy_function=os.link)
            copy = to / file.relative_to(phase)
            copy.unlink()
            if left is not None:
                copy.write_bytes(left)
            # An empty file cannot become shorter.
            if left != content:
                yield file.relative_to(newest), to / newest.name
            shutil.rmtree(to)


def assert_every_damage_is_found(phase, to, caplog):
    """The names of the files of the newest checkpoint, without which the run resumes from the one before it."""
    names = set()
    for name, newest in damaged_copies(phase, to):
        caplog.clear()
        before = last_complete(newest.parent)
        assert before is not None and before.name == f"checkpoint-{int(newest.name[11:]) - 1}", name
        assert not newest.exists()
        noted = [record.getMessage() for record in caplog.records]
        # A checkpoint without its mark is one that a killed run was writing.
        assert name.name == "complete" or (len(noted) == 1 and f"{newest} is damaged ({name} " in noted[0])
        names.add(str(name))
    return names


def test_zero2_and_a_damaged_checkpoint(folder, recipe, caplog):
    recipe, whole, out = recipe("zero2"), folder / "whole", folder / "run"
    finished(start(recipe, whole))
    line = failed(start(recipe, out, fault=kill, rank=1, step=2))
    # Either the first rank reports the lost connection, or the launcher sends it SIGTERM first.
    assert line.startswith(
        (
            "popi: another rank ended without an error, as if it was killed; the same command resumes",
            f"popi: interrupted; the same command resumes from the last checkpoint in {out}",
        )
    )
    line = failed(start(recipe, out, fault=full_disk, rank=1, step=3))
    phase = out / "phases" / "1-both"
    assert line == (
        f"popi: rank 1: cannot write {phase}/checkpoint-3: the disk may be full; fix this and run the same command to "
        "resume"
    )
    assert (phase / "checkpoint-3").exists() and last_complete(phase) == phase / "checkpoint-2"

    names = assert_every_damage_is_found(phase, folder / "copy", caplog)
    shards = {name for name in names if "optim_states" in name}
    assert len(shards) == 4 and {"trainer_state.json", "rng_state_1.pth", "generator/latest"} <= names

    shard = next(file for file in phase.rglob("checkpoint-2/global_step*/*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    damaged, resuming = finished(start(recipe, out))
    assert damaged.startswith(f"popi: {phase}/checkpoint-2 is damaged ({shard.relative_to(phase / 'checkpoint-2')} has")
    assert resuming == f"popi: resuming from {phase}/checkpoint-1"
    assert same_weights(out, whole)


def test_sigterm_ends_one_process_in_one_line_and_every_damage_of_its_checkpoint_is_found(folder, recipe, caplog):
    out = folder / "single"
    words = [sys.executable, "-m", "popi", "train", str(recipe("single", steps=100)), "--out", str(out)]
    with subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(list(out.rglob("complete"))) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == f"popi: interrupted; the same command resumes from the last checkpoint in {out}"
    assert "Traceback" not in said
    assert_every_damage_is_found(out / "phases" / "1-both", folder / "copy", caplog)


def test_ddp_and_signals(folder, recipe):
    recipe, out = recipe("ddp"), folder / "run-ddp"
    run = start(recipe, out, fault=slow, rank=1, step=2, POPI_TEST_SECONDS="60")
    run.wait_until(run.mark.exists)
    run.launcher.send_signal(signal.SIGTERM)
    line = failed(run).replace("rank 1: ", "")
    assert line == f"popi: interrupted; the same command resumes from the last checkpoint in {out}"
    line = failed(start(recipe, out, fault=hang, rank=0, step=2, POPI_TEST_TIMEOUT="6"))
    assert line == (
        "popi: rank 1: another rank did not answer for 0.1 minutes; the same command resumes from the last checkpoint"
    )
    line = failed(start(recipe, out, fault=nan_logit, rank=1, step=3))
    assert line == (
        "popi: rank 1: a logit of the writer became nan after 2 steps; lower the learning rate and start a new run"
    )
