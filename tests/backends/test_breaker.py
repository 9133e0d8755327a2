"""When a circuit breaker opens, probes and closes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.backends.wrappers import Breaker
from popi.errors import ConfigError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("numbers", [{"failures": 0}, {"cooldown": 0}])
def test_a_breaker_of_nothing_is_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"field {next(iter(numbers))}: must be positive, got 0"):
        Breaker(**numbers)


def opened(clock: Clock) -> Breaker:
    """One that a failure has opened, of which a probe is due."""
    breaker = Breaker(failures=1, cooldown=10, clock=clock)
    breaker.failed(breaker.admit(1))
    clock.now += 11
    return breaker


def test_a_probe_that_was_given_up_makes_room_for_another() -> None:
    breaker = opened(Clock())
    probe = breaker.admit(3)
    assert (probe.count, breaker.admit(3).count) == (1, 0)
    breaker.abandoned(probe)
    assert breaker.admit(3).count == 1


def test_what_was_sent_before_it_opened_tells_an_open_breaker_nothing() -> None:
    breaker = Breaker(failures=1, cooldown=10, clock=(clock := Clock()))
    early = breaker.admit(4)
    breaker.failed(early)
    clock.now = 9
    breaker.failed(early)
    breaker.succeeded(early)
    clock.now = 11
    probe = breaker.admit(3)
    assert probe.count == 1 and not breaker.closed
    breaker.abandoned(early)
    breaker.failed(early)
    assert breaker.admit(3).count == 0
    breaker.succeeded(probe)
    assert breaker.closed


def test_failures_one_after_the_other_open_it() -> None:
    breaker = Breaker(failures=3)
    for closed in (True, True, False):
        breaker.failed(breaker.admit(1))
        assert breaker.closed == closed


def test_a_success_resets_the_count() -> None:
    breaker = Breaker(failures=2)
    for _ in range(5):
        breaker.failed(breaker.admit(1))
        breaker.succeeded(breaker.admit(1))
    assert breaker.closed


def test_failures_at_the_same_time_open_it_if_none_succeeds() -> None:
    breaker = Breaker(failures=3)
    batch = breaker.admit(64)
    for _ in range(64):
        breaker.failed(batch)
    assert not breaker.closed


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_what_fails_beside_a_success_that_came_before_it_does_not_count(outcomes: list[bool]) -> None:
    """Of requests that are sent at the same time: as many failures as come before the first success count."""
    breaker = Breaker(failures=3)
    requests = [breaker.admit(1) for _ in outcomes]
    first = outcomes.index(True) if True in outcomes else len(outcomes)
    for request, good in zip(requests, outcomes, strict=True):
        if good:
            breaker.succeeded(request)
        else:
            breaker.failed(request)
    assert breaker.closed == (first < 3)


def test_late_failures_after_many_successes_do_not_open_it() -> None:
    breaker = Breaker(failures=3)
    requests = [breaker.admit(1) for _ in range(64)]
    for request in requests[:61]:
        breaker.succeeded(request)
    for request in requests[61:]:
        breaker.failed(request)
    assert breaker.closed
    # The server stops then: what is sent from now on counts.
    for _ in range(3):
        breaker.failed(breaker.admit(1))
    assert not breaker.closed
