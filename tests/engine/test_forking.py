"""Locks that are free in a forked child, whoever held them."""

from __future__ import annotations

import threading
import time

import pytest

from popi.engine.forking import ForkLock
from tests.forks import needs_fork, succeeds_in_child

pytestmark = [needs_fork, pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")]


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


def test_what_a_child_must_not_inherit_is_released_while_all_locks_are_held() -> None:
    acquired = list[bool]()

    def release() -> None:
        elsewhere = threading.Thread(target=lambda: acquired.append(lock._lock.acquire(blocking=False)))
        elsewhere.start()
        elsewhere.join()

    lock = ForkLock(before_fork=release)
    assert succeeds_in_child(lambda: acquired == [False])
    assert acquired == [False]


def test_locks_may_be_made_while_other_threads_fork() -> None:
    over, locks = threading.Event(), list[ForkLock]()

    def make() -> None:
        while not over.is_set():
            locks[:] = [ForkLock() for _ in range(50)]

    thread = threading.Thread(target=make)
    thread.start()
    try:
        assert all(succeeds_in_child(lambda: ForkLock().number >= 0) for _ in range(5))
    finally:
        over.set()
        thread.join()
