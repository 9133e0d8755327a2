"""A circuit breaker: keeps requests from a backend that is down."""

from __future__ import annotations

import time
from collections.abc import Callable

from popi.errors import ConfigError


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

    def admit(self, wanted: int) -> int:
        """How many of so many requests may go: all, none, or one, whose outcome has to be told."""
        if self.closed:
            return wanted
        if self._probing or self._clock() < self._until:
            return 0
        self._probing = wanted > 0
        return min(wanted, 1)

    def succeeded(self) -> None:
        """A request was served: the backend is up."""
        self._failed, self._probing = 0, False

    def failed(self) -> None:
        """A request was not."""
        self._failed, self._probing = self._failed + 1, False
        self._until = self._clock() + self._rest

    def abandoned(self) -> None:
        """A request was given up before anything was known."""
        self._probing = False
