"""A circuit breaker: keeps requests from a backend that is down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from popi.backends.sharing import renew_after_fork
from popi.engine.forking import ForkLock
from popi.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Admission:
    """Requests that a breaker let through. Passed back with the outcome of each.

    Attributes:
        count: Number of requests that may be sent.
        served: Number of requests that had succeeded before.
        probe: Whether the only request is a probe.
    """

    count: int
    served: int = 0
    probe: bool = False


class Breaker:
    """Opens the circuit after a number of failures, then lets one request through as a probe.

    A failure counts only if no request succeeded between the start and the end of the failed one, and a success resets
    the count: three time-outs among 64 concurrent requests, of which the others succeed, do not open the circuit. A
    successful probe closes the circuit, a failed one opens it again. Several event loops and threads may share a
    breaker.

    Args:
        failures: Number of failures that opens the circuit.
        cooldown: Seconds from the opening to the probe.
        clock: Returns the time in seconds.

    Raises:
        ConfigError: If a number is not positive.

    Example:
        >>> breaker = Breaker(failures=2)
        >>> breaker.failed(breaker.admit(1)); breaker.failed(breaker.admit(1))
        >>> breaker.closed, breaker.admit(5).count
        (False, 0)
    """

    def __init__(
        self, *, failures: int = 3, cooldown: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        for name, value in {"failures": failures, "cooldown": cooldown}.items():
            if not value > 0:
                raise ConfigError(f"must be positive, got {value}", field=name)
        self._limit, self._cooldown, self._clock = failures, cooldown, clock
        self._failed, self._served, self._until, self._lock = 0, 0, 0.0, ForkLock()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Drops a probe that runs in the parent process."""
        self._probing = False

    @property
    def closed(self) -> bool:
        """Whether all requests go through."""
        return self._failed < self._limit

    def admit(self, wanted: int) -> Admission:
        """Lets requests through: all, none, or one as a probe."""
        with self._lock:
            if self.closed:
                return Admission(wanted, self._served)
            if not wanted or self._probing or self._clock() < self._until:
                return Admission(0, self._served)
            self._probing = True
            return Admission(1, self._served, probe=True)

    def succeeded(self, admission: Admission) -> None:
        """Reports that a request succeeded."""
        with self._lock:
            if self._counts(admission):
                self._failed = 0
                self._served += 1

    def failed(self, admission: Admission) -> None:
        """Reports that a request failed."""
        with self._lock:
            if self._counts(admission) and (admission.probe or admission.served == self._served):
                self._failed += 1
                self._until = self._clock() + self._cooldown

    def abandoned(self, admission: Admission) -> None:
        """Reports that a request says nothing about the backend: it was cancelled, or failed for its own reason."""
        with self._lock:
            self._counts(admission)

    def _counts(self, admission: Admission) -> bool:
        """Whether an outcome matters: while the circuit is open, only that of the probe."""
        if admission.probe:
            self._probing = False
        return admission.probe or self.closed
