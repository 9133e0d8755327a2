"""The queue of a model: concurrent calls of any thread and event loop run in one continuous batch."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from popi.engine.cache import Layout
from popi.engine.calls import Call, Scorer
from popi.engine.decoding import Decoder, Draft, Job, Outcome, in_order
from popi.engine.forking import ForkLock
from popi.engine.packing import Scored
from popi.errors import BackendError

Within = Callable[[], AbstractContextManager[None]]


class ModelService:
    """Runs the calls of any number of threads and event loops on one model.

    All calls share one continuous batch, which a single thread computes while there is work: drafts of different calls
    are decoded together, and so are scores. Cancelling a future frees its rows at the next step. A child of ``os.fork``
    starts with an empty queue.

    Args:
        model: The model. It is put into evaluation mode during each step.
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
        self._arrived: list[Call[Any, Any]] = []
        self._calls: set[Call[Any, Any]] = set()
        self._ended = deque[Call[Any, Any]]()
        self._decoder = Decoder(
            self._model, end_tokens=self._end_tokens, batch_tokens=self._batch_tokens, layout=self._layout
        )
        self._scorer = Scorer(self._model, self._layout, self._batch_tokens)
        self._decoding = self._scoring = 0.0

    def decode(self, drafts: Sequence[Draft]) -> Future[list[Outcome]]:
        """Continues prompts.

        Returns:
            One outcome for each draft, in order. The future raises :class:`popi.errors.BackendError` if the model fails
            or the service is closed.

        Raises:
            BackendError: If the service is closed.
        """
        call = Call[Draft, Outcome](drafts, self._ended.append)
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
        call = Call[Scored, float](items, self._ended.append)
        self._submit(call)
        return call.future

    def close(self) -> None:
        """Fails the calls that have not ended, and waits for the step that the model is computing."""
        with self._lock:
            self._closed = True
        self._worker.shutdown(wait=True)

    def _submit(self, call: Call[Any, Any]) -> None:
        with self._lock:
            if self._closed:
                raise BackendError(f"{self._name}: the backend is closed")
            self._arrived.append(call)
            if not self._working:
                self._working = True
                self._worker.submit(self._work)

    def _work(self) -> None:
        """Computes until the queue is empty."""
        try:
            while self._take():
                with self._computing:
                    self._step()
                self._deliver()
        # A bug in this module must not leave callers waiting.
        except BaseException as error:
            with self._lock:
                self._fail({*self._calls, *self._arrived}, reason(error), error)
                self._deliver()
                self._start_over()
            raise

    def _take(self) -> bool:
        """Starts the calls that have arrived. Returns whether any work is left."""
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

    def _start(self, call: Call[Any, Any]) -> None:
        if call.over:
            return
        call.end_if_complete()
        if isinstance(next(iter(call.requests), None), Scored):
            self._scorer.add(call)
            return
        drafts = [self._guarded(call, draft) for draft in call.requests]
        call.jobs = [Job(drafts[place], partial(call.put, place), call) for place in in_order(drafts)]
        self._decoder.add(call.jobs)

    def _guarded(self, call: Call[Draft, Outcome], draft: Draft) -> Draft:
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
        # A model can raise any exception: out of memory, a lost device, an index out of range.
        except Exception as error:
            affected = self._scorer.abandon() if scores else {job.owner for job in self._decoder.abandon()}
            self._fail(affected or self._calls, reason(error), error)
        spent = time.perf_counter() - began
        self._scoring, self._decoding = self._scoring + scores * spent, self._decoding + (not scores) * spent

    def _fail(self, calls: Iterable[Call[Any, Any]], why: str, error: BaseException | None = None) -> None:
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


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_start_over)
