"""Counts what requests cost, and rejects those that might exceed the budget."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from popi.backends.base import (
    Backend,
    ChatRequest,
    ChatResult,
    OnComplete,
    ScoreRequest,
    ScoreResult,
    ignore_result,
)
from popi.backends.ledger import Ledger, Price, Spent
from popi.backends.together import closing
from popi.backends.wrappers.base import Request, Result, Wrapper
from popi.errors import BackendError
from popi.io import writable

TURN_TOKENS, FRAME_TOKENS = 16, 64
"""Estimates of the maximum number of tokens that a chat template adds to a turn, and to a conversation."""

NEVER_BILLED: frozenset[str | None] = frozenset({"request", "denied", "rate_limit", "budget"})
"""Failures of requests that no model has processed."""


class Cost(Wrapper):
    """Charges each request to the accounts of a run, and rejects requests that might exceed its budget.

    The maximum price of a request is reserved before it is sent: no token is shorter than a byte, and no response is
    longer than ``max_tokens``. It is replaced by the price of the tokens that the server reports. If the server reports
    none, the request fails, or the stream is closed early, the maximum is recorded as ``unsure``, and counts towards
    the budget.

    Example:
        >>> import asyncio
        >>> from popi.prompts import Message
        >>> from popi.testing import ScriptedBackend
        >>> ledger = Ledger(cap=1.0)
        >>> inner = ScriptedBackend({"Hello": "Hi there."})
        >>> backend = Cost(inner, price=Price(prompt=0.5, completion=2.0), ledger=ledger)
        >>> [result] = asyncio.run(backend.chat([ChatRequest([Message("user", "Hello")], user="ann")]))
        >>> ledger.by_user()["ann"].requests, ledger.total.money > 0
        (1, True)

    Args:
        inner: The backend.
        price: Price of its tokens.
        ledger: The accounts, which several backends may share.
        role: The role that sends the requests.
    """

    def __init__(self, inner: Backend, *, price: Price, ledger: Ledger, role: str = "") -> None:
        super().__init__(inner)
        self._price, self._ledger, self._role = price, ledger, role

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """See :meth:`Backend.chat`."""
        return await self._all(requests, self.inner.chat, ChatResult)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """See :meth:`Backend.score`."""
        return await self._all(requests, self.inner.score, ScoreResult)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, and yields the text in pieces.

        Raises:
            BackendError: If the request fails, the stream breaks, or the request might exceed the budget.
        """
        most = self._most(request)
        if not await self._ledger.reserve(most):
            raise BackendError(f"{self.model}: {self._refusal(most)}", failure="budget")
        spent = Spent(requests=1, unsure=most)

        def answered(result: ChatResult) -> None:
            nonlocal spent
            spent = self._of(result, most)
            on_complete(result)

        try:
            async with closing(self.inner.stream(request, answered)) as pieces:
                async for piece in pieces:
                    yield piece
        except BackendError as error:
            if error.failure in NEVER_BILLED:
                spent = Spent(requests=1)
            raise
        finally:
            self._ledger.settle(most, spent, role=self._role, user=request.user)

    async def _all(
        self,
        requests: Sequence[Request],
        ask: Callable[[Sequence[Request]], Awaitable[list[Result]]],
        kind: type[Result],
    ) -> list[Result]:
        """Sends the requests that fit into the budget together, and the others after them."""
        results: dict[int, Result] = {}
        waiting = deque((place, self._most(request)) for place, request in enumerate(requests))
        while waiting:
            place, most = waiting.popleft()
            if not await self._ledger.reserve(most):
                results[place] = kind.failed(self._refusal(most), "budget", model=self.model)
                continue
            taken = {place: most}
            # Without waiting: two calls that wait for each other's reservations would wait forever.
            while waiting and self._ledger.try_reserve(waiting[0][1]):
                place, most = waiting.popleft()
                taken[place] = most
            answers = await self._settled([(requests[place], most) for place, most in taken.items()], ask)
            results |= zip(taken, answers, strict=True)
        return [results[place] for place in range(len(requests))]

    async def _settled(
        self, reserved: Sequence[tuple[Request, float]], ask: Callable[[Sequence[Request]], Awaitable[list[Result]]]
    ) -> list[Result]:
        """Sends requests, and records the price of each."""
        spent = [Spent(requests=1, unsure=most) for _, most in reserved]
        try:
            results = await ask([request for request, _ in reserved])
            spent = [self._of(result, most) for result, (_, most) in zip(results, reserved, strict=True)]
            return results
        except BackendError as error:
            # Of several requests some may have been processed before the error.
            if error.failure in NEVER_BILLED and len(reserved) == 1:
                spent = [Spent(requests=1)]
            raise
        finally:
            for (request, most), account in zip(reserved, spent, strict=True):
                self._ledger.settle(most, account, role=self._role, user=request.user)

    def _most(self, request: ChatRequest | ScoreRequest) -> float:
        prompt = FRAME_TOKENS + sum(_bytes(turn.content) + TURN_TOKENS for turn in request.messages)
        if isinstance(request, ChatRequest):
            return self._price.of(prompt + _bytes(request.response_prefix), request.max_tokens)
        return self._price.of(prompt + _bytes(request.response) + TURN_TOKENS, 1)

    def _of(self, result: ChatResult | ScoreResult, most: float) -> Spent:
        if result.failure in NEVER_BILLED:
            return Spent(requests=1)
        # An empty response costs as much as its reasoning.
        if result.failure not in (None, "empty") or not result.prompt_tokens:
            return Spent(requests=1, unsure=most)
        if isinstance(result, ScoreResult):
            prompt, completion = result.prompt_tokens + result.tokens, 0
        else:
            prompt, completion = result.prompt_tokens, result.completion_tokens
        return Spent(1, prompt, completion, self._price.of(prompt, completion))

    def _refusal(self, most: float) -> str:
        total = self._ledger.total
        return (
            f"not sent: the request might cost {most:.6f}, and {total.money + total.unsure:.6f} of the budget of "
            f"{self._ledger.cap:g} is spent"
        )


def _bytes(text: str) -> int:
    return len(writable(text).encode())
