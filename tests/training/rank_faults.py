"""``popi`` with a planted fault: the program that torchrun starts in tests of faults, and what starts it."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.training.rank_runs import command, environment

FAULT = "POPI_TEST_FAULT"
"""The variable that names the fault, its rank, its step and the file whose creation marks that it happened."""

SECONDS, TIMEOUT = "POPI_TEST_SECONDS", "POPI_TEST_TIMEOUT"
"""The variables that say for how many seconds a slow rank sleeps, and how long ranks wait for each other."""

ROOM = 2**13
"""Maximum size of a file in bytes, for a rank whose disk is full. Every rank writes a larger file into a checkpoint."""


def kill(_: Any) -> None:
    """The rank ends without a word, as if it had been killed for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_vllm(_: Any) -> None:
    """The vLLM beside the rank is killed."""
    [engine] = multiprocessing.active_children()
    engine.kill()


def error(_: Any) -> None:
    """The rank raises an error that popi does not know."""
    raise ValueError("planted")


def slow(_: Any) -> None:
    """The rank is slow."""
    time.sleep(float(os.environ[SECONDS]))


def hang(_: Any) -> None:
    """The rank waits for something that never comes."""
    time.sleep(3600)


def full_disk(_: Any) -> None:
    """No file of the rank can grow beyond :data:`ROOM`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))


def nan_loss(reward: Any) -> None:
    """The generator's loss is NaN on the rank."""
    loss = reward._loss
    reward._loss = lambda *given: loss(*given) * float("nan")


def nan_logit(trainer: Any) -> None:
    """A logit of the rank's writer is NaN while it samples."""

    def sample(*_: Any, **__: Any) -> Any:
        raise ArithmeticError("planted")

    trainer._rollouts.sample = sample


PLACES = {
    kill: "training_step",
    kill_vllm: "training_step",
    error: "training_step",
    slow: "training_step",
    nan_logit: "roll_out",
    hang: "reward",
    nan_loss: "reward",
    full_disk: "log",
}
"""The part of a step in which each fault happens."""


def plant(fault: Callable[[Any], None], step: int, mark: Path) -> None:
    """Makes a fault happen in a step of this process.

    Args:
        fault: The fault.
        step: The step of the run, starting at 1.
        mark: The file that is created when it happens.
    """
    from popi.training.generator import GeneratorTrainer
    from popi.training.metrics import MetricsCallback
    from popi.training.reward import PairReward
    from popi.training.writer import WriterTrainer

    def before(owner: Any, name: str, step_of: Callable[..., int]) -> None:
        original = getattr(owner, name)

        def patched(self: Any, *given: Any, **named: Any) -> Any:
            if step_of(self, *given) == step and not mark.exists():
                mark.touch()
                fault(self)
            return original(self, *given, **named)

        setattr(owner, name, patched)

    place = PLACES[fault]
    if place == "log":
        # After the step, and before its checkpoint.
        before(MetricsCallback, "on_log", lambda self, _, state, *__: self._phase.first + state.global_step)
    elif place == "reward":
        before(PairReward, "__call__", lambda self, users, replies, done: done + 1)
    else:
        for trainer in (WriterTrainer, GeneratorTrainer):
            if hasattr(trainer, place):
                before(trainer, place, lambda self, *_: self._first + self.state.global_step + 1)


@dataclass(frozen=True)
class Run:
    """A run that was started.

    Attributes:
        launcher: Its launcher.
        out: The run folder.
        mark: The file whose creation marks that the fault happened.
    """

    launcher: subprocess.Popen[str]
    out: Path
    mark: Path

    def processes(self) -> list[int]:
        """The launcher and its ranks, which have process groups of their own, as far as they have not ended."""
        return [int(each.name) for each in Path("/proc").glob("[0-9]*") if str(self.out) in _words(each)]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something to happen, or for the launcher to end."""
        while self.launcher.poll() is None and not condition():
            time.sleep(0.01)

    def kill_all(self) -> None:
        """Kills the launcher and all ranks, as a machine does that loses its power."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def ended(self, seconds: float = 120) -> tuple[str, float]:
        """What the launcher and all ranks said, and the seconds between the fault and the end of the last of them.

        Raises:
            TimeoutError: If one is left after ``seconds``. All of them are killed.
        """
        try:
            # The ranks write to the same pipe, which is open until the last one has ended.
            said, _ = self.launcher.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            self.kill_all()
            said, _ = self.launcher.communicate()
            raise TimeoutError(said) from error
        at = time.time()
        assert not self.processes()
        return said, at - self.mark.stat().st_mtime if self.mark.exists() else 0.0


def _words(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_text().split("\0")
    except OSError:
        return []


def start(
    recipe: Path,
    out: Path,
    *,
    fault: Callable[[Any], None] | None = None,
    rank: int = 1,
    step: int = 2,
    **variables: str,
) -> Run:
    """Starts ``popi train`` on two ranks under torchrun.

    Args:
        recipe: The recipe.
        out: The run folder.
        fault: The fault.
        rank: The rank in which it happens.
        step: The step in which it happens.
        variables: Further variables of the environment.
    """
    mark = out.with_name(f"{out.name}.mark")
    mark.unlink(missing_ok=True)
    if fault is not None:
        variables[FAULT] = f"{fault.__name__} {rank} {step} {mark}"
    launcher = subprocess.Popen(
        command(2, "tests.training.rank_faults", "train", str(recipe), "--out", str(out)),
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_listen_to_ctrl_c,
    )
    return Run(launcher, out, mark)


def _listen_to_ctrl_c() -> None:
    """A suite in the background of a shell ignores the signal, and so would every process that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lines_of_popi(said: str) -> list[str]:
    """The lines that popi printed, without its progress."""
    lines = [line for line in said.splitlines() if line.startswith("popi: ")]
    return [line for line in lines if not re.match(r"popi: (tiny: \d|step \d|reference: |curves.png |\d+ of )", line)]


def main() -> int:
    """Runs ``popi`` with the fault that the environment names."""
    from popi.cli import main as popi
    from popi.training import ranks

    # A picture takes longer than the steps of these runs.
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    if TIMEOUT in os.environ:
        ranks.TIMEOUT = timedelta(seconds=float(os.environ[TIMEOUT]))
    if FAULT in os.environ:
        name, rank, step, mark = os.environ[FAULT].split(maxsplit=3)
        if rank == os.environ["RANK"]:
            plant({fault.__name__: fault for fault in PLACES}[name], int(step), Path(mark))
    return popi()


if __name__ == "__main__":
    sys.exit(main())
