"""The library's front door: observe signals, infer a summary, answer under it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

from popi import registry
from popi.assembly import open_backend
from popi.backends.base import Backend, OnComplete, ignore_result
from popi.backends.ledger import Ledger, Spent
from popi.backends.sharing import renew_after_fork
from popi.backends.together import held
from popi.errors import BackendError
from popi.roles import Conditioned, ConditionedGenerator, PreferenceInference
from popi.signals import Signal, UserSignals, as_user_id
from popi.summary import PreferenceSummary

Result = TypeVar("Result")


class Personalizer:
    """Holds users' signals in memory and answers each user in the way they prefer.

    ::

        personalizer = Personalizer.load("popi-mini-base")
        personalizer.observe("ann", Statement(text="Keep it short, please."))
        print(personalizer.infer_sync("ann").text)
        print(personalizer.respond_sync("ann", "How do magnets work?"))

    It is an asynchronous context manager that closes the backends it was given.

    Args:
        inference: Writes the summaries.
        generator: Answers under them.
        backends: Closed together with this.
        ledgers: Accounts of what they cost.
    """

    def __init__(
        self,
        inference: PreferenceInference,
        generator: ConditionedGenerator,
        *,
        backends: Sequence[Backend] = (),
        ledgers: Sequence[Ledger] = (),
    ) -> None:
        self._inference = inference
        self._generator = generator
        self._backends, self._ledgers = backends, ledgers
        self._signals: dict[str, UserSignals] = {}
        self._inferred: dict[str, tuple[tuple[str, ...], PreferenceSummary]] = {}
        self._edited: dict[str, PreferenceSummary] = {}
        # A lock belongs to the event loop of the tasks that wait for it.
        self._locks: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str], asyncio.Lock]
        self._own_loop = _LoopInThread()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Replaces what a forked child must not share with its parent; runs in the child."""
        self._lock = threading.Lock()
        self._locks = WeakValueDictionary()

    @classmethod
    def load(cls, model: str, *, generator: str | None = None) -> Self:
        """Makes both roles from models.

        Args:
            model: Name, path or hub id of the model that writes summaries, or a YAML file that describes a backend: see
                :func:`popi.assembly.open_backend`.
            generator: Likewise, of the model that answers; ``None`` lets one model do both.

        Raises:
            ConfigError: If a file describes no backend.
            ModelError: If a model cannot be found or used.
            MissingExtra: If what runs it is not installed.
        """
        opened = [open_backend(name) for name in dict.fromkeys((model, generator or model))]
        (writer, _), (reader, _) = opened[0], opened[-1]
        return cls(
            registry.inference("llm")(writer),
            registry.generator("prompted")(reader),
            backends=[backend for backend, _ in opened],
            ledgers=[ledger for _, ledger in opened],
        )

    def observe(self, user_id: str, *signals: Signal) -> None:
        """Adds to what is known of a user, newest last; a signal that is known already changes nothing.

        Raises:
            InputError: If the id of a new signal stands for another one.
        """
        user_id = as_user_id(user_id)
        with self._lock:
            self._signals[user_id] = self.signals(user_id).add(*signals)

    def signals(self, user_id: str) -> UserSignals:
        """What was observed of a user."""
        user_id = as_user_id(user_id)
        return self._signals.get(user_id) or UserSignals(user_id=user_id)

    async def infer(self, user_id: str) -> PreferenceSummary:
        """The user's summary: as a person edited it, else as inferred from all signals observed so far.

        It is inferred anew only when the signals, the templates or the model have changed.

        Raises:
            BackendError: If it cannot be had.
        """
        user_id = as_user_id(user_id)
        lock = self._locks.setdefault((asyncio.get_running_loop(), user_id), asyncio.Lock())
        async with lock:
            if user_id in self._edited:
                return self._edited[user_id]
            user = self.signals(user_id)
            key = (user.digest(), self._template_hash(), self._inference.name)
            if user_id not in self._inferred or self._inferred[user_id][0] != key:
                [summary] = await self._inference.infer([user])
                self._inferred[user_id] = key, summary
            return self._edited.get(user_id, self._inferred[user_id][1])

    def _template_hash(self) -> str:
        return "" if self._inference.format is None else self._inference.format.template_hash

    async def edit(self, user_id: str, text: str) -> PreferenceSummary:
        """Replaces the summary by a person's words, which hold from now on, whatever signals come.

        Raises:
            BackendError: If there was no summary and none can be had.
        """
        user_id = as_user_id(user_id)
        self._edited[user_id] = (await self.infer(user_id)).edit(text)
        return self._edited[user_id]

    def withdraw_edit(self, user_id: str) -> None:
        """Goes back to the summary that is inferred; harmless where nothing was edited."""
        self._edited.pop(as_user_id(user_id), None)

    async def respond(self, user_id: str, prompt: str) -> str:
        """Answers a prompt under the user's summary.

        Raises:
            BackendError: If the summary or the answer cannot be had.
        """
        [result] = await self._generator.respond([Conditioned(prompt, await self.infer(user_id))])
        if result.error is not None:
            raise BackendError(f"no answer for user {user_id!r}: {result.error}")
        return result.text

    async def stream(self, user_id: str, prompt: str, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Answers a prompt under the user's summary, piece by piece.

        Args:
            user_id: The user.
            prompt: What is asked.
            on_complete: Told the whole answer in the end, with its tokens and why it ended.

        Raises:
            BackendError: If the summary or the answer cannot be had, or the answer breaks off.
        """
        summary = await self.infer(user_id)
        async with held(self._generator.stream(Conditioned(prompt, summary), on_complete)) as pieces:
            async for piece in pieces:
                yield piece

    def spent(self, user_id: str | None = None) -> Spent:
        """What was spent so far on a user, or on all, where a backend's file keeps the accounts."""
        accounts = [
            ledger.total if user_id is None else ledger.by_user().get(as_user_id(user_id), Spent())
            for ledger in self._ledgers
        ]
        return sum(accounts, Spent())

    def infer_sync(self, user_id: str) -> PreferenceSummary:
        """:meth:`infer` for code that is not asynchronous, from any thread."""
        return self._own_loop.run(self.infer(user_id))

    def respond_sync(self, user_id: str, prompt: str) -> str:
        """:meth:`respond` for code that is not asynchronous, from any thread."""
        return self._own_loop.run(self.respond(user_id, prompt))

    async def close(self) -> None:
        """Closes the backends. Closing twice is harmless."""
        for backend in self._backends:
            await backend.close()
        self._own_loop.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _LoopInThread:
    """An event loop in a thread of its own, started when it is first needed, for callers that have none."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Forgets the loop: its thread does not exist in a forked child."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Waits for work; an interruption of the wait cancels it."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="popi-loop", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """Ends the thread; the next work starts another."""
        with self._starting:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None
