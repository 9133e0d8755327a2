"""One queue in front of a model: concurrent calls of any thread and event loop run in one continuous batch."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from popi.engine.cache import Layout
from popi.engine.decoding import Decoder, Draft, Job, Outcome, in_order
from popi.engine.forking import ForkLock
from popi.engine.packing import Row, Scored, pack
from popi.engine.scoring import score_pass
from popi.errors import BackendError

Request = TypeVar("Request")
Result = TypeVar("Result")
Within = Callable[[], AbstractContextManager[None]]


class _Call(Generic[Request, Result]):
    """A call of several requests, which ends when all of them have ended.

    Args:
        requests: The requests.
        on_end: Called when the call has ended, failed or was cancelled, from any thread.
    """

    def __init__(self, requests: Sequence[Request], on_end: Callable[[_Call[Any, Any]], None]) -> None:
        self.requests, self._on_end = requests, on_end
        self.future: Future[list[Result]] = Future()
        self.jobs: list[Job] = []
        self._results: dict[int, Result] = {}
        self._error: BackendError | None = None
        self.future.add_done_callback(self._cancel)

    @property
    def over(self) -> bool:
        """Whether nobody waits for what is left of it."""
        return self._error is not None or self.future.cancelled()

    def put(self, place: int, result: Result) -> None:
        """Adds the result of a request."""
        self._results[place] = result
        self.end_if_complete()

    def end_if_complete(self) -> None:
        """Ends the call if all results are there."""
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
        """Gives the results or the error to the caller, unless it has cancelled the call."""
        # It may do so at any time, and then the future does not take them.
        with suppress(InvalidStateError):
            if self._error is not None:
                self.future.set_exception(self._error)
            elif not self.future.cancelled():
                self.future.set_result([self._results[place] for place in range(len(self.requests))])


class _Scorer:
    """Scores the items of all calls that are waiting, in common passes."""

    def __init__(self, model: PreTrainedModel, layout: Layout, batch_tokens: int) -> None:
        self._model, self._layout, self._batch_tokens = model, layout, batch_tokens
        self._waiting: list[_Call[Scored, float]] = []
        self._clear()

    def _clear(self) -> None:
        self._owners: list[tuple[_Call[Scored, float], int]] = []
        self._items: list[Scored] = []
        self._passes = deque[list[Row]]()
        self._current: list[Row] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to score."""
        return bool(self._waiting or self._passes)

    def add(self, call: _Call[Scored, float]) -> None:
        """Adds a call behind those that are waiting."""
        self._waiting.append(call)

    def step(self) -> None:
        """Runs one pass. What has arrived during the passes before is packed when they are done."""
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

    def abandon(self) -> set[_Call[Scored, float]]:
        """Drops the pass that failed, and returns its calls."""
        indices = {index for row in self._current for index in row.items} or range(len(self._owners))
        calls = {self._owners[index][0] for index in indices}
        self._current = []
        return calls


class ModelService:
    """Runs the calls of any number of threads and event loops on one model.

    All calls share one continuous batch, which a single thread computes: drafts of different calls are decoded
    together, and so are scores. Cancelling a future frees its rows at the next step. The thread is there only while
    there is work. A child of ``os.fork`` starts with an empty queue.

    Args:
        model: The model. If it is in training mode, it is in evaluation mode during each step.
        name: Name of the model in errors.
        layout: Layout of the batches.
        end_tokens: Token ids that end a response.
        batch_tokens: Maximum number of tokens in a batch, including room for the responses.
        within: Makes the context that the model computes in, for example autocast.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        layout: Layout,
        end_tokens: Set[int],
        batch_tokens: int,
        within: Within,
    ) -> None:
        self._model, self._name, self._layout, self._within = model, name, layout, within
        self._end_tokens, self._batch_tokens = end_tokens, batch_tokens
        self._closed = False
        self._lock = ForkLock()
        # Held while the model computes, so that a fork does not copy it in the middle of a step.
        self._computing = ForkLock()
        self._start_over()
        _services.add(self)

    def _start_over(self) -> None:
        """Starts with an empty queue and no thread."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="popi-model")
        self._working = False
        self._arrived: list[_Call[Any, Any]] = []
        self._calls: set[_Call[Any, Any]] = set()
        self._ended = deque[_Call[Any, Any]]()
        self._decoder = Decoder(
            self._model, end_tokens=self._end_tokens, batch_tokens=self._batch_tokens, layout=self._layout
        )
        self._scorer = _Scorer(self._model, self._layout, self._batch_tokens)
        self._decoding = self._scoring = 0.0

    def decode(self, drafts: Sequence[Draft]) -> Future[list[Outcome]]:
        """Continues prompts.

        Returns:
            One outcome for each draft, in order. The future raises :class:`popi.errors.BackendError` if the model fails
            or the service is closed.

        Raises:
            BackendError: If the service is closed.
        """
        call = _Call[Draft, Outcome](drafts, self._ended.append)
        self._submit(call)
        return call.future

    def score(self, items: Sequence[Scored]) -> Future[list[float]]:
        """Sums the log-probabilities of responses.

        Returns:
            One sum for each item in nats, in order; not finite where the logits of the model are not. The future raises
            as that of :meth:`decode`.

        Raises:
            BackendError: If the service is closed.
        """
        call = _Call[Scored, float](items, self._ended.append)
        self._submit(call)
        return call.future

    def close(self) -> None:
        """Fails the calls that have not ended, and waits for the step that the model is computing."""
        with self._lock:
            self._closed = True
        self._worker.shutdown(wait=True)

    def _submit(self, call: _Call[Any, Any]) -> None:
        with self._lock:
            if self._closed:
                raise BackendError(f"{self._name}: the backend is closed")
            self._arrived.append(call)
            if not self._working:
                self._working = True
                self._worker.submit(self._work)

    def _work(self) -> None:
        """Computes until nothing is left."""
        try:
            while self._take():
                with self._computing:
                    self._step()
                self._deliver()
        # A fault of this module must not leave anybody waiting.
        except BaseException as error:
            with self._lock:
                self._fail({*self._calls, *self._arrived}, reason(error), error)
                self._deliver()
                self._start_over()
            raise

    def _take(self) -> bool:
        """Starts the calls that have arrived. Returns whether there is anything to compute."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            closed = self._closed
            self._working = not closed and bool(arrived or self._decoder.busy or self._scorer.busy)
            working = self._working
        self._calls.update(arrived)
        if closed:
            self._fail(self._calls, "the backend is closed")
        else:
            for call in arrived:
                self._start(call)
        self._deliver()
        return working

    def _start(self, call: _Call[Any, Any]) -> None:
        if call.over:
            return
        call.end_if_complete()
        if isinstance(next(iter(call.requests), None), Scored):
            self._scorer.add(call)
            return
        drafts = [self._guarded(call, draft) for draft in call.requests]
        call.jobs = [Job(drafts[place], partial(call.put, place), call) for place in in_order(drafts)]
        self._decoder.add(call.jobs)

    def _guarded(self, call: _Call[Draft, Outcome], draft: Draft) -> Draft:
        """A draft whose ``watch`` fails only its own call."""
        watch = draft.watch
        if watch is None:
            return draft

        def guarded(token_ids: Sequence[int]) -> bool:
            try:
                return watch(token_ids)
            except Exception as error:
                self._fail([call], reason(error), error)
                return True

        return replace(draft, watch=guarded)

    def _step(self) -> None:
        """Computes one step of decoding or one pass of scoring; both get the same time while both have work."""
        scores = self._scorer.busy and (not self._decoder.busy or self._scoring <= self._decoding)
        if not (self._scorer.busy and self._decoder.busy):
            self._decoding = self._scoring = 0.0
        began = time.perf_counter()
        try:
            with evaluating(self._model), self._within():
                (self._scorer if scores else self._decoder).step()
        # The code of a model raises what it likes: out of memory, a lost device, an index out of range.
        except Exception as error:
            affected = self._scorer.abandon() if scores else {job.owner for job in self._decoder.abandon()}
            self._fail(affected or self._calls, reason(error), error)
        spent = time.perf_counter() - began
        self._scoring, self._decoding = self._scoring + scores * spent, self._decoding + (not scores) * spent

    def _fail(self, calls: Iterable[_Call[Any, Any]], why: str, error: BaseException | None = None) -> None:
        for call in list(calls):
            failure = BackendError(f"{self._name}: {why}")
            # Without its traceback, which would keep the tensors of the failed step in memory.
            failure.__cause__ = None if error is None else error.with_traceback(None)
            call.fail(failure)

    def _deliver(self) -> None:
        while self._ended:
            call = self._ended.popleft()
            self._calls.discard(call)
            call.deliver()


def reason(error: BaseException) -> str:
    """Says in one line why a model failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; lower batch_tokens or use a smaller model"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients inside the block."""
    training = model.training
    if training:
        model.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train(True)


_services: WeakSet[ModelService] = WeakSet()


def _start_over() -> None:
    for service in _services:
        service._start_over()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_start_over)
