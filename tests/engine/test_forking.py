"""Locks that are free in a forked child, whoever held them."""

from __future__ import annotations

import threading
import time

import pytest

from popi.engine.forking import ForkLock
from tests.forks import needs_fork, succeeds_in_child


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_can_acquire_a_lock_that_another_thread_held() -> None:
    older, newer = ForkLock(), ForkLock()
    started = threading.Event()

    def hold() -> None:
        with newer:
            started.set()
            time.sleep(0.1)
            with older:
                time.sleep(0.05)

    def acquire() -> bool:
        with older, newer:
            return True

    thread = threading.Thread(target=hold)
    thread.start()
    started.wait()
    assert succeeds_in_child(acquire)
    thread.join()
    assert acquire()
