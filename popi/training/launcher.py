"""How a rank ends when its launcher ends, or tells it to end."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from types import FrameType

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


def ignore() -> None:
    """Ignores further signals of the launcher, which would interrupt this rank while it ends."""
    for number in TOLD_TO_END:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, _ignore)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A terminal and a launcher may both send it.
    ignore()
    raise KeyboardInterrupt


def _ignore(number: int, frame: FrameType | None) -> None:
    """Unlike ``SIG_IGN``, it is not inherited by processes that this one starts."""


def _watch(launcher: int, streams: tuple[socket.socket, socket.socket]) -> None:
    heard, _ = streams
    # Without its launcher, a rank would keep the run locked, and wait for the other ranks.
    while os.getppid() == launcher:
        if select.select([heard], [], [], LAUNCHER_CHECK)[0] and set(heard.recv(64)) & set(TOLD_TO_END):
            time.sleep(SECONDS_TO_END)
            break
    os._exit(1)
