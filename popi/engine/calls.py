"""Calls of several requests that are waiting for a model, and the scores of those that are computed together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from popi.engine.cache import Layout
from popi.engine.decoding import Job
from popi.engine.packing import Row, Scored, pack
from popi.engine.scoring import score_pass
from popi.errors import BackendError

Request = TypeVar("Request")
Result = TypeVar("Result")


class Call(Generic[Request, Result]):
    """A call of several requests, which ends when all of them have ended.

    Args:
        requests: The requests.
        on_end: Called when the call has ended, failed or was cancelled, from any thread.
    """

    def __init__(self, requests: Sequence[Request], on_end: Callable[[Call[Any, Any]], None]) -> None:
        self.requests, self._on_end = requests, on_end
        self.future: Future[list[Result]] = Future()
        self.jobs: list[Job] = []
        self._results: dict[int, Result] = {}
        self._error: BackendError | None = None
        self.future.add_done_callback(self._cancel)

    @property
    def over(self) -> bool:
        """Whether no caller waits for its remaining results."""
        return self._error is not None or self.future.cancelled()

    def put(self, place: int, result: Result) -> None:
        """Adds the result of a request."""
        self._results[place] = result
        self.end_if_complete()

    def end_if_complete(self) -> None:
        """Ends the call if all results have arrived."""
        if len(self._results) == len(self.requests):
            self._on_end(self)

    def fail(self, error: BackendError) -> None:
        """Ends the call with an error."""
        if self._error is None:
            self._error = error
            self._drop()

    def _cancel(self, future: Future[list[Result]]) -> None:
        if future.cancelled():
            self._drop()

    def _drop(self) -> None:
        for job in self.jobs:
            job.cancelled = True
        self._on_end(self)

    def deliver(self) -> None:
        """Passes the results or the error to the caller, unless the caller has cancelled the call."""
        # The caller may cancel at any time, and a cancelled future raises.
        with suppress(InvalidStateError):
            if self._error is not None:
                self.future.set_exception(self._error)
            elif not self.future.cancelled():
                self.future.set_result([self._results[place] for place in range(len(self.requests))])


class Scorer:
    """Scores the items of all calls that are waiting, in common passes."""

    def __init__(self, model: PreTrainedModel, layout: Layout, batch_tokens: int) -> None:
        self._model, self._layout, self._batch_tokens = model, layout, batch_tokens
        self._waiting: list[Call[Scored, float]] = []
        self._clear()

    def _clear(self) -> None:
        self._owners: list[tuple[Call[Scored, float], int]] = []
        self._items: list[Scored] = []
        self._passes = deque[list[Row]]()
        self._current: list[Row] = []

    @property
    def busy(self) -> bool:
        """Whether any item is waiting."""
        return bool(self._waiting or self._passes)

    def add(self, call: Call[Scored, float]) -> None:
        """Appends a call to the queue."""
        self._waiting.append(call)

    def step(self) -> None:
        """Runs one pass. Calls that arrived during earlier passes are packed after these."""
        if not self._passes:
            calls, self._waiting = self._waiting, []
            self._owners = [(call, place) for call in calls if not call.over for place in range(len(call.requests))]
            self._items = [call.requests[place] for call, place in self._owners]
            self._passes += pack(self._model, self._items, batch_tokens=self._batch_tokens, layout=self._layout)
        if self._passes:
            rows = self._passes.popleft()
            self._current = [row for row in rows if not all(self._owners[index][0].over for index in row.items)]
        if self._current:
            for index, logprob in score_pass(self._model, self._items, self._current).items():
                call, place = self._owners[index]
                call.put(place, logprob)
            self._current = []
        if not self._passes:
            self._clear()

    def abandon(self) -> set[Call[Scored, float]]:
        """Drops the pass that failed, and returns its calls."""
        indices = {index for row in self._current for index in row.items} or range(len(self._owners))
        calls = {self._owners[index][0] for index in indices}
        self._current = []
        return calls
