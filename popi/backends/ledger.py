"""Accounts: the tokens and the money that requests cost, and the budget that they must not exceed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from popi.backends.deadline import waiting
from popi.backends.sharing import Waiter, renew_after_fork
from popi.engine.forking import ForkLock
from popi.errors import ConfigError

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """The price of a million tokens, in any one currency.

    Attributes:
        prompt: Price of a million prompt tokens.
        completion: Price of a million completion tokens.

    Raises:
        ConfigError: If a price is negative or not a number.

    Example:
        >>> Price(prompt=0.5, completion=2.0).of(1_000_000, 500_000)
        1.5
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"a price must be zero or positive, got {value}", field=field.name)

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Returns the price of a number of tokens, which may be a mean."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / MILLION


FREE = Price(0.0, 0.0)
"""The price of a model that costs nothing."""


@dataclass(frozen=True, slots=True)
class Spent:
    """An account.

    Attributes:
        requests: Number of requests that were sent.
        prompt_tokens: Prompt tokens, as reported by the servers.
        completion_tokens: Completion tokens, as reported by the servers.
        money: Price of these tokens.
        unsure: Upper bound on the price of requests whose tokens no server reported: requests that failed, and streams
            that were closed early.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0
    unsure: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Spent)))


class Ledger:
    """The accounts of a run, by role and user. Several backends, event loops and threads may share one.

    A forked child has its own copy, so a budget applies to each process separately.

    Example:
        >>> import asyncio
        >>> ledger = Ledger(cap=1.0)
        >>> asyncio.run(ledger.reserve(0.75))
        True
        >>> ledger.settle(0.75, Spent(requests=1, money=0.25), role="generator", user="ann")
        >>> ledger.total.money, ledger.by_user()["ann"].requests
        (0.25, 1)
        >>> asyncio.run(ledger.reserve(0.8))
        False

    Args:
        cap: Maximum amount of money to spend; ``None`` is no limit.

    Attributes:
        cap: Maximum amount of money to spend.
        refused: Number of requests that did not fit into the budget.

    Raises:
        ConfigError: If the cap is negative or not a number.
    """

    def __init__(self, cap: float | None = None) -> None:
        if cap is not None and not cap >= 0:
            raise ConfigError(f"a budget must be zero or positive, got {cap}", field="budget")
        self.cap, self.refused = cap, 0
        self._accounts: dict[tuple[str, str], Spent] = {}
        self._total, self._lock = Spent(), ForkLock()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Drops the reservations: their requests run in the parent process."""
        self._reserved, self._open = 0.0, 0
        self._waiting: list[Waiter] = []

    @property
    def total(self) -> Spent:
        """The account of the run."""
        return self._total

    def by_role(self) -> dict[str, Spent]:
        """Returns the accounts by role."""
        return self._by(lambda role, _: role)

    def by_user(self) -> dict[str, Spent]:
        """Returns the accounts by user."""
        return self._by(lambda _, user: user)

    async def reserve(self, most: float) -> bool:
        """Reserves money for a request. Waits for open requests to be settled if that could make room.

        Args:
            most: Upper bound on the price of the request.

        Returns:
            Whether the money is reserved. If so, :meth:`settle` must be called when the request has ended, also if it
            failed.
        """
        while True:
            with self._lock:
                if self._take(most):
                    return True
                # Waiting cannot free money that is already spent.
                if not self._open or not self._fits(most - self._reserved):
                    self.refused += 1
                    return False
                waiter = Waiter()
                self._waiting.append(waiter)
            with waiting():
                await waiter

    def try_reserve(self, most: float) -> bool:
        """Reserves money for a request without waiting. See :meth:`reserve`."""
        with self._lock:
            return self._take(most)

    def settle(self, most: float, spent: Spent, *, role: str, user: str) -> None:
        """Replaces a reservation by the cost of the request."""
        with self._lock:
            self._open -= 1
            # Reset to zero: sums and differences of floats leave a rounding error.
            self._reserved = self._reserved - most if self._open else 0.0
            account = (role, user)
            self._accounts[account] = self._accounts.get(account, Spent()) + spent
            # A running total: it is read before every request, and every user may have an account.
            self._total += spent
            waiters, self._waiting = self._waiting, []
        for waiter in waiters:
            waiter.wake()

    def forget_users(self) -> None:
        """Drops the accounts by role and user, which grow with the number of users. The total stays."""
        with self._lock:
            self._accounts.clear()

    def _take(self, most: float) -> bool:
        if not self._fits(most):
            return False
        self._reserved, self._open = self._reserved + most, self._open + 1
        return True

    def _fits(self, most: float) -> bool:
        if self.cap is None:
            return True
        return self._total.money + self._total.unsure + self._reserved + most <= self.cap

    def _by(self, key: Callable[[str, str], str]) -> dict[str, Spent]:
        accounts: dict[str, Spent] = {}
        with self._lock:
            entries = list(self._accounts.items())
        for (role, user), spent in entries:
            accounts[key(role, user)] = accounts.get(key(role, user), Spent()) + spent
        return accounts
