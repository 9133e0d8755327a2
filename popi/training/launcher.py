"""How ranks end: with their launcher, when it tells them to, or when one of them fails."""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from popi.errors import PopiError
from popi.training import ranks

log = logging.getLogger(__name__)

LAUNCHER_CHECK = 0.5
"""Seconds between two checks that the launcher is alive."""

SECONDS_TO_END = 5.0
"""Seconds in which a rank that was told to end can do so by itself."""

TOLD_TO_END = (signal.SIGINT, signal.SIGTERM)


def follow() -> None:
    """Interrupts this rank when its launcher tells it to end, and ends it with its launcher.

    SIGTERM, which launchers and schedulers send, has the effect of Ctrl-C. A rank that waits for another one, or for
    code that hangs, does not see the interruption, so it is ended :data:`SECONDS_TO_END` later.
    """
    heard, heard_by_python = socket.socketpair()
    heard_by_python.setblocking(False)
    signal.set_wakeup_fd(heard_by_python.fileno(), warn_on_full_buffer=False)
    for number in TOLD_TO_END:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    streams = (heard, heard_by_python)
    threading.Thread(target=_watch, args=(os.getppid(), streams), name="popi-launcher", daemon=True).start()


@contextmanager
def reporting_once(of: ranks.Ranks) -> Iterator[None]:
    """Lets only one rank report why the ranks end: if one fails, all others lose their connection to it.

    Raises:
        SystemExit: On a rank that fails after another one has reported an error.
        PopiError: If another rank does not answer, and has not reported an error.
    """
    try:
        yield
    except BaseException as error:
        _ignore_signals()
        if not isinstance(error, SystemExit) and not of.is_first_to_report():
            raise SystemExit(getattr(error, "exit_code", 1)) from error
        if of.count > 1 and (failure := _peer_failure(error)):
            raise failure from error
        raise


def _peer_failure(error: BaseException) -> PopiError | None:
    """The error to report in place of one that says no more than that another rank does not answer."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, dist.DistError) or (isinstance(each, RuntimeError) and "gloo" in str(each)):
            late = re.search("timed? ?out", str(each), re.IGNORECASE)
            minutes = ranks.TIMEOUT.total_seconds() / 60
            what = (
                f"did not answer for {minutes:.2g} minutes" if late else "ended without an error, as if it was killed"
            )
            return PopiError(f"another rank {what}; the same command resumes from the last checkpoint")
        each = each.__cause__
    return None


def _ignore_signals() -> None:
    # The launcher tells the others to end when the first one has ended, and would interrupt them while they do.
    for number in TOLD_TO_END:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, _ignore)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A terminal and a launcher may both send it.
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore(number: int, frame: FrameType | None) -> None:
    """Unlike ``SIG_IGN``, it is not inherited by processes that this one starts."""


def _watch(launcher: int, streams: tuple[socket.socket, socket.socket]) -> None:
    heard, _ = streams
    # Without its launcher, a rank would keep the run locked, and wait for the other ranks.
    while os.getppid() == launcher:
        if select.select([heard], [], [], LAUNCHER_CHECK)[0] and set(heard.recv(64)) & set(TOLD_TO_END):
            time.sleep(SECONDS_TO_END)
            os._exit(1)
    if os.environ.get("RANK", "0") == "0":
        log.warning("the launcher has ended; the same command resumes from the last checkpoint")
    os._exit(1)
