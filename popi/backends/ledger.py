"""Accounts: what requests cost, in tokens and in money, and the line that is not passed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, fields

from popi.backends.deadline import waiting
from popi.errors import ConfigError

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """What a million tokens costs, in one's currency.

    Attributes:
        prompt: Of what is read.
        completion: Of what is written.

    Raises:
        ConfigError: If it is negative.
    """

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self) -> None:
        if not min(self.prompt, self.completion) >= 0:
            raise ConfigError("a price is no less than nothing")

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The price of so many tokens, which may be a mean."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / MILLION


@dataclass(frozen=True, slots=True)
class Spent:
    """An account.

    Attributes:
        requests: How many were sent.
        prompt_tokens: That were read, as the servers say.
        completion_tokens: That were written, likewise.
        money: What these cost.
        unsure: The most that the others cost, of which no server has told the tokens: requests that failed on their
            way, and streams that were left.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0
    unsure: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Spent)))


class Ledger:
    """The accounts of a run, by role and user, which several backends may share.

    Args:
        cap: The most money of the run; ``None`` is no limit.

    Attributes:
        cap: The same.
        refused: How many requests it had no room for.

    Raises:
        ConfigError: If the cap is negative.
    """

    def __init__(self, cap: float | None = None) -> None:
        if cap is not None and cap < 0:
            raise ConfigError(f"a budget of {cap} is less than nothing", field="budget")
        self.cap, self.refused = cap, 0
        self._accounts: dict[tuple[str, str], Spent] = {}
        self._total, self._reserved, self._open = Spent(), 0.0, 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def total(self) -> Spent:
        """Of the run."""
        return self._total

    def by_role(self) -> dict[str, Spent]:
        """The accounts of the roles."""
        return self._by(lambda role, _: role)

    def by_user(self) -> dict[str, Spent]:
        """The accounts of the users."""
        return self._by(lambda _, user: user)

    async def reserve(self, most: float) -> bool:
        """Sets money aside for a request; waits for others to be settled if that may make room.

        Args:
            most: The most that it can cost.

        Returns:
            Whether there is so much. If so, :meth:`settle` has to be called for it, whatever becomes of it.
        """
        while not self.fits(most):
            # What is spent does not come back.
            if not self._open or not self.fits(most - self._reserved):
                self.refused += 1
                return False
            others = asyncio.get_running_loop().create_future()
            self._waiting.append(others)
            with waiting():
                await others
        self._reserved, self._open = self._reserved + most, self._open + 1
        return True

    def settle(self, most: float, spent: Spent, *, role: str, user: str) -> None:
        """Enters what a request cost in place of what was set aside for it."""
        self._open -= 1
        # Sums of fractions that come and go leave dust.
        self._reserved = self._reserved - most if self._open else 0.0
        account = (role, user)
        self._accounts[account] = self._accounts.get(account, Spent()) + spent
        # Asked for before every request, of which there may be as many as users.
        self._total += spent
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def fits(self, most: float) -> bool:
        """Whether there is so much now."""
        if self.cap is None:
            return True
        return self._total.money + self._total.unsure + self._reserved + most <= self.cap

    def _by(self, key: Callable[[str, str], str]) -> dict[str, Spent]:
        found: dict[str, Spent] = {}
        for (role, user), spent in self._accounts.items():
            found[key(role, user)] = found.get(key(role, user), Spent()) + spent
        return found
