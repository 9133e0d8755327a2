"""Counts what requests cost, and sends none that might cost too much."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from popi.backends.base import (
    Backend,
    ChatRequest,
    ChatResult,
    FailureKind,
    OnComplete,
    ScoreRequest,
    ScoreResult,
    ignore_result,
)
from popi.backends.ledger import Ledger, Price, Spent
from popi.backends.together import held
from popi.backends.wrappers.base import Request, Result, Wrapper
from popi.errors import BackendError
from popi.io import writable

TURN_TOKENS, FRAME_TOKENS = 16, 64
"""The most tokens that a chat template adds to a turn, and to a conversation, by judgement."""

NEVER_BILLED: frozenset[FailureKind | None] = frozenset({"request", "denied", "rate_limit", "budget"})
"""Failures of requests that no model has read."""


class Cost(Wrapper):
    """Enters every request into the accounts of a run, and refuses those that might pass its cap.

    What a request can cost at most is set aside before it is sent: no token is shorter than a byte, and no answer is
    longer than it may be. What it did cost is what the server says; where it says nothing, and for requests that failed
    on their way and streams that were left, that most stays in the accounts as unsure, and counts towards the cap.

    Args:
        inner: The backend that is asked.
        price: What its tokens cost.
        ledger: The accounts, which several backends may share.
        role: Whose requests these are.
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
        """Continues one conversation, piece by piece.

        Raises:
            BackendError: If the answer cannot be had or breaks off, or might cost too much.
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
            async with held(self.inner.stream(request, answered)) as pieces:
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
        """Sets money aside for as many as there is money for, asks for these together, and goes on with the rest."""
        results: dict[int, Result] = {}
        waiting = deque((place, self._most(request)) for place, request in enumerate(requests))
        while waiting:
            place, most = waiting.popleft()
            if not await self._ledger.reserve(most):
                results[place] = kind.failed(self._refusal(most), "budget", model=self.model)
                continue
            taken = {place: most}
            while waiting and self._ledger.fits(waiting[0][1]):
                place, most = waiting.popleft()
                await self._ledger.reserve(most)
                taken[place] = most
            answers = await self._settled([(requests[place], most) for place, most in taken.items()], ask)
            results |= zip(taken, answers, strict=True)
        return [results[place] for place in range(len(requests))]

    async def _settled(
        self, reserved: Sequence[tuple[Request, float]], ask: Callable[[Sequence[Request]], Awaitable[list[Result]]]
    ) -> list[Result]:
        """Asks, and enters what each request came to."""
        spent = [Spent(requests=1, unsure=most) for _, most in reserved]
        try:
            results = await ask([request for request, _ in reserved])
            spent = [self._of(result, most) for result, (_, most) in zip(results, reserved, strict=True)]
            return results
        except BackendError as error:
            # Of several some may have been read until then.
            if error.failure in NEVER_BILLED and len(reserved) == 1:
                spent = [Spent(requests=1)]
            raise
        finally:
            for (request, most), account in zip(reserved, spent, strict=True):
                self._ledger.settle(most, account, role=self._role, user=request.user)

    def _most(self, request: ChatRequest | ScoreRequest) -> float:
        read = FRAME_TOKENS + sum(_bytes(turn.content) + TURN_TOKENS for turn in request.messages)
        if isinstance(request, ChatRequest):
            return self._price.of(read, request.max_tokens)
        return self._price.of(read + _bytes(request.response) + TURN_TOKENS, 1)

    def _of(self, result: ChatResult | ScoreResult, most: float) -> Spent:
        if result.failure is not None:
            return Spent(requests=1, unsure=0.0 if result.failure in NEVER_BILLED else most)
        if isinstance(result, ScoreResult):
            read, written = result.prompt_tokens + result.tokens, 0
        else:
            read, written = result.prompt_tokens, result.completion_tokens
        if not read:
            return Spent(requests=1, unsure=most)
        return Spent(1, read, written, self._price.of(read, written))

    def _refusal(self, most: float) -> str:
        total = self._ledger.total
        return (
            f"not sent: it might cost {most:.6f}, and {total.money + total.unsure:.6f} of the budget of "
            f"{self._ledger.cap:g} is spent"
        )


def _bytes(text: str) -> int:
    return len(writable(text).encode())
