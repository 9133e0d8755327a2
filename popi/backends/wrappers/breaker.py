"""A circuit breaker: keeps requests from a backend that is down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from popi.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Admission:
    """What a breaker has let through; told again with the outcome of each request.

    Attributes:
        count: How many requests may go.
        probe: Whether the one of them is a probe.
    """

    count: int
    probe: bool = False


class Breaker:
    """Lets requests through until so many in a row have failed; then none for a while, and then one as a probe.

    Closed, open and half-open, as these states are called. A probe that succeeds closes it, one that fails opens it for
    as long again.

    Args:
        failures: How many in a row open it.
        rest: Seconds until a probe.
        clock: Tells seconds.

    Raises:
        ConfigError: If a number makes no sense.
    """

    def __init__(self, *, failures: int = 3, rest: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        if failures < 1 or rest <= 0:
            raise ConfigError(f"{failures} failures and {rest} s of rest make no circuit breaker")
        self._limit, self._rest, self._clock = failures, rest, clock
        self._failed, self._until, self._probing = 0, 0.0, False

    @property
    def closed(self) -> bool:
        """Whether all requests go through."""
        return self._failed < self._limit

    def admit(self, wanted: int) -> Admission:
        """Lets so many requests through: all, none, or one as a probe."""
        if self.closed:
            return Admission(wanted)
        if self._probing or self._clock() < self._until:
            return Admission(0)
        self._probing = wanted > 0
        return Admission(min(wanted, 1), probe=self._probing)

    def succeeded(self, admission: Admission) -> None:
        """A request was served: the backend is up."""
        if self._counts(admission):
            self._failed = 0

    def failed(self, admission: Admission) -> None:
        """A request was not."""
        if self._counts(admission):
            self._failed += 1
            self._until = self._clock() + self._rest

    def abandoned(self, admission: Admission) -> None:
        """A request tells nothing: it was given up, or failed for a reason of its own."""
        self._counts(admission)

    def _counts(self, admission: Admission) -> bool:
        """Whether an outcome is news: while this is open the probe's alone, and no straggler's from before."""
        if admission.probe:
            self._probing = False
        return admission.probe or self.closed
