"""Plants faults in trainings of two ranks, and prints what the user sees, how long it takes, and what resuming gives.

``PYTHONPATH=. python benchmarks/faults.py --engines zero2 ddp`` prints a row of a table for each fault. The full disk
is a small file system in memory, which only root may mount.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from popi.config import load
from tests.training import rank_faults
from tests.training.rank_faults import Run, lines_of_popi, start
from tests.training.rank_runs import make_inputs, same_weights, write_recipe

STEP = 3
SLOW = "60"
TIMEOUT = "10"
"""Seconds for which a rank waits for one that hangs. The default is half an hour."""

ROOM = 20 * 2**20
"""Bytes that are left on a full disk: less than a checkpoint needs."""

FAULTS = {
    "SIGKILL of the first rank": (rank_faults.kill, 0),
    "SIGKILL of another rank": (rank_faults.kill, 1),
    "an error that popi does not know, on one rank": (rank_faults.error, 1),
    "NaN in the loss of one rank": (rank_faults.nan_loss, 1),
    "NaN in a logit of one rank": (rank_faults.nan_logit, 1),
    "disk full for the first rank": (rank_faults.full_disk, 0),
    "disk full for another rank": (rank_faults.full_disk, 1),
    f"a rank hangs in the reward (time-out of {TIMEOUT} s)": (rank_faults.hang, 1),
    f"a rank is slow by {SLOW} s": (rank_faults.slow, 1),
}
SIGNALS = {
    "SIGKILL of the launcher": signal.SIGKILL,
    "SIGTERM of the launcher": signal.SIGTERM,
    "Ctrl-C": signal.SIGINT,
}


FULL = "the disk is full for all ranks"
KILLED_VLLM = "SIGKILL of the vLLM beside a rank"
TRUNCATED = "SIGKILL of a rank, and a truncated file in its newest checkpoint"
TRUNCATE = 'truncate --size=-100 "$(find "$0" -type f -size +8k -path "*/checkpoint-2/*" | sort | head -n 1)"'
WITH_VLLM = {"writer.rollouts": "vllm-colocate", "writer.cache_gib": 0.25}


@dataclass(frozen=True)
class Bench:
    """A recipe and an undisturbed run of it.

    Attributes:
        recipe: The recipe.
        whole: The undisturbed run.
        out: The run that is disturbed.
    """

    recipe: Path
    whole: Path
    out: Path

    def planted(self, fault: Callable[[Any], None], rank: int) -> Run:
        """Starts a run with a fault in one rank."""
        limit = {rank_faults.TIMEOUT: TIMEOUT} if fault is rank_faults.hang else {}
        return start(self.recipe, self.out, fault=fault, rank=rank, step=STEP, **limit)

    def signalled(self, number: signal.Signals) -> Run:
        """Starts a run, and sends its launcher a signal in the middle of a step."""
        run = start(self.recipe, self.out, fault=rank_faults.slow, step=STEP, POPI_TEST_SECONDS="0.5")
        run.wait_until(run.mark.exists)
        run.launcher.send_signal(number)
        return run

    def full(self) -> Run:
        """Starts a run on a disk that is full after its first checkpoint."""
        self.out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(self.out)], check=True)
        run = start(self.recipe, self.out)
        run.wait_until(lambda: bool(list(self.out.rglob("checkpoint-1/complete"))))
        used = shutil.disk_usage(self.out).used
        subprocess.run(["mount", "-o", f"remount,size={used + ROOM}", str(self.out)], check=True)
        run.mark.touch()
        return run

    def row(self, name: str, begin: Callable[[], Run], *repair: str) -> None:
        """Measures a fault, resumes the run, and prints a row of the table."""
        shutil.rmtree(self.out, ignore_errors=True)
        run = begin()
        said, seconds = run.ended(600)
        code = run.launcher.returncode
        walls = len({line[:7] for line in said.splitlines() if line.startswith("[rank")})
        seen = "; ".join(self._shown(said)) + (f" + a traceback of {walls} rank" if walls else "")
        if repair:
            subprocess.run(repair, check=True)
        resumed = "-"
        if code:
            again = start(self.recipe, self.out)
            said, _ = again.ended(600)
            same = again.launcher.returncode == 0 and same_weights(self.out, self.whole)
            notes = [line for line in self._shown(said) if "resuming" in line or "damaged" in line]
            resumed = "; ".join([*notes, "equal weights" if same else "OTHER WEIGHTS"])
        print(f"| {name} | {seen} | {code} | {seconds:.1f} | {resumed} |", flush=True)

    def _shown(self, said: str) -> list[str]:
        return [line.replace(f"{self.out}", "RUN") for line in lines_of_popi(said)]


def prepared(folder: Path, changes: dict[str, Any]) -> Bench:
    """Makes a recipe in an empty folder, and runs it undisturbed."""
    folder.mkdir(parents=True)
    file = folder / "recipe.yaml"
    resolved = load(write_recipe(file, make_inputs(folder)), {"steps": 4, **changes})
    bench = Bench(write_recipe(file, resolved.model_dump(mode="json")), folder / "whole", folder / "disturbed")
    start(bench.recipe, bench.whole).ended(600)
    return bench


def main() -> None:
    """Measures all faults under some engines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["zero2"], choices=["ddp", "zero1", "zero2", "zero3"])
    parser.add_argument("--faults", default="", help="only those whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    folder = given.out.resolve()
    os.environ.update({rank_faults.SECONDS: SLOW})
    for engine in given.engines:
        bench = prepared(folder / engine, {"engine.kind": engine})
        print(f"\n| {engine} | what the user sees | exit code | seconds | the next start |", flush=True)
        print("|---|---|---|---|---|", flush=True)
        rows = {
            **{name: partial(bench.planted, *planted) for name, planted in FAULTS.items()},
            **{name: partial(bench.signalled, number) for name, number in SIGNALS.items()},
        }
        for name, begin in rows.items():
            if given.faults in name:
                bench.row(name, begin)
        if given.faults in TRUNCATED:
            bench.row(TRUNCATED, partial(bench.planted, rank_faults.kill, 1), "sh", "-c", TRUNCATE, str(bench.out))
        if given.faults in KILLED_VLLM:
            with_vllm = prepared(folder / f"{engine}-vllm", {"engine.kind": engine, **WITH_VLLM})
            with_vllm.row(KILLED_VLLM, partial(with_vllm.planted, rank_faults.kill_vllm, 1))
        if given.faults in FULL:
            bench.row(FULL, bench.full, "mount", "-o", "remount,size=1g", str(bench.out))
            subprocess.run(["umount", str(bench.out)], check=True)


if __name__ == "__main__":
    main()
