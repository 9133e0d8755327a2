"""The main entry point of the library: store the signals of users, infer their preferences, respond accordingly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from popi import registry
from popi.assembly import open_backend
from popi.backends.base import Backend, ChatResult, FailureKind
from popi.backends.ledger import Ledger, Spent
from popi.backends.sharing import renew_after_fork
from popi.backends.together import closing
from popi.concurrency import BackgroundLoop, attempts
from popi.errors import BackendError, ConfigError, PopiError
from popi.interface import Interface
from popi.response import OnComplete, Response, ignore_response, read_response, response_or_raise
from popi.roles import Conditioned, ConditionedGenerator, Failure, PreferenceInference
from popi.signals import Signal, UserSignals, as_user_id
from popi.store import InferenceKey, InMemoryStore, Store, Version

User = TypeVar("User", bound=str | UserSignals)
Prompt = TypeVar("Prompt", bound=Conditioned | tuple[str | None, str])

MAX_CONCURRENCY = 64
"""Default maximum number of users or prompts at the same time."""


class Personalizer:
    """Stores the signals of users, infers their preferences and responds to each user accordingly.

    All methods may be called from any thread, and the asynchronous ones from any event loop. Methods that end in
    ``_sync`` block until they have a result. A forked child can use its copy of the personalizer. Requests run on an
    event loop in a background thread, which the classes of both roles must not block. The personalizer is an
    asynchronous context manager; leaving the block closes its backends.

    Example:
        >>> from popi import Personalizer, Statement
        >>> from popi.testing import ScriptedBackend
        >>> def script(request):
        ...     asks_for_summary = request.messages[-1].content.startswith("Signals of one user")
        ...     return "- short answers [1]" if asks_for_summary else "Poles attract."
        >>> personalizer = Personalizer.load(ScriptedBackend(script))
        >>> personalizer.observe("ann", Statement(text="Keep it short, please."))
        >>> personalizer.infer_sync("ann").text
        '- short answers'
        >>> response = personalizer.respond_sync("ann", "How do magnets work?")
        >>> response.text, response.finish_reason
        ('Poles attract.', 'stop')

    Args:
        inference: Infers the preferences of users; ``None`` if only given summaries are used.
        generator: Responds to prompts; ``None`` if only summaries are inferred.
        store: Keeps the signals and summaries; by default in memory.
        backends: Backends to close together with the personalizer.
        ledgers: Accounts of their cost.

    Attributes:
        inference: As above.
        generator: As above.
        store: As above.
        ledgers: As above.

    Raises:
        ConfigError: If the generator does not accept what the inference infers.
    """

    def __init__(
        self,
        inference: PreferenceInference[Any] | None,
        generator: ConditionedGenerator | None,
        *,
        store: Store | None = None,
        backends: Sequence[Backend] = (),
        ledgers: Sequence[Ledger] = (),
    ) -> None:
        if inference is not None and generator is not None and inference.kind not in generator.interfaces:
            accepted = " or ".join(sorted(generator.interfaces)) or "nothing"
            raise ConfigError(
                f"the generator {generator.name!r} does not accept the {inference.kind} that the inference "
                f"{inference.name!r} infers",
                fix=f"it accepts: {accepted}; choose another model or class",
            )
        self.inference, self.generator = inference, generator
        self.store: Store = InMemoryStore() if store is None else store
        self.ledgers = ledgers
        self._backends = backends
        self._background = BackgroundLoop()
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Drops the inferences that run in the parent process."""
        # Used on the background loop only.
        self._running: dict[str, asyncio.Future[_Inferred | None]] = {}

    @classmethod
    def load(
        cls,
        model: str | Backend,
        *,
        generator: str | Backend | None = None,
        inference: str | None = "llm",
        generation: str | None = "prompted",
        inference_options: Mapping[str, Any] | None = None,
        generator_options: Mapping[str, Any] | None = None,
        store: Store | None = None,
    ) -> Self:
        """Makes a personalizer from models and from the names of classes.

        Args:
            model: The model that infers: its name, path or hub id; a YAML file that describes a backend, see
                :func:`popi.assembly.open_backend`; or a backend.
            generator: The model that responds, given in the same way; ``None`` is ``model``.
            inference: The class that infers: a name in :data:`popi.registry.INFERENCES`, or ``module:Class``. ``None``
                leaves it out.
            generation: The class that responds: a name in :data:`popi.registry.GENERATORS`, or ``module:Class``.
                ``None`` leaves it out.
            inference_options: Options of the first class, for example ``max_tokens``, ``temperature``, ``seed``,
                ``language`` and ``prompts``.
            generator_options: Options of the second class, for example ``max_tokens``, ``temperature``, ``seed`` and
                ``prompts``.
            store: Keeps the signals and summaries; by default in memory.

        Raises:
            ConfigError: If a name, an option or a file is not valid, or the generator does not accept what the
                inference infers.
            ModelError: If a model cannot be found or used.
            MissingExtra: If the packages that run a model are not installed.
        """
        infers, responds = dict(inference_options or {}), dict(generator_options or {})
        # Options are checked before models are loaded, which takes longer.
        if inference is not None:
            registry.inference_options(inference, **infers)
        if generation is not None:
            registry.generator_options(generation, **responds)
        reader = model if generator is None else generator
        opened: dict[str | Backend, tuple[Backend, Ledger]] = {}
        try:
            for name in ([] if inference is None else [model]) + ([] if generation is None else [reader]):
                if name not in opened:
                    opened[name] = open_backend(name) if isinstance(name, str) else (name, Ledger())
            return cls(
                None if inference is None else registry.make_inference(inference, opened[model][0], **infers),
                None if generation is None else registry.make_generator(generation, opened[reader][0], **responds),
                store=store,
                backends=[backend for backend, _ in opened.values()],
                ledgers=[ledger for _, ledger in opened.values()],
            )
        except BaseException:
            loop = BackgroundLoop()
            loop.wait(_close(backend for backend, _ in opened.values()))
            loop.stop()
            raise

    def observe(self, user_id: str, *signals: Signal) -> None:
        """Stores signals of a user, newest last. A signal that is already stored is not repeated.

        Raises:
            InputError: If a new signal has the id of a different one. No signal is stored then.
        """
        self.store.add_signals(user_id, *signals)

    def signals(self, user_id: str) -> UserSignals:
        """The stored signals of a user."""
        return self.store.signals(user_id)

    def users(self) -> list[str]:
        """The ids of all users with signals or edits."""
        return self.store.users()

    def history(self, user_id: str) -> tuple[Version, ...]:
        """All versions of a user's summary, edits included, oldest first."""
        return self.store.history(user_id)

    def edit(self, user_id: str, text: str) -> Version:
        """Replaces the summary by a person's text. It stays current even if signals or summaries are added later.

        Unchanged claims keep their evidence. No model is called.

        Raises:
            ConfigError: If the generator does not accept summaries.
        """
        if self.generator is not None and "summary" not in self.generator.interfaces:
            raise ConfigError(f"the generator {self.generator.name!r} does not accept summaries, which can be edited")
        return self.store.edit(user_id, text)

    def withdraw_edit(self, user_id: str) -> bool:
        """Goes back to the inferred summary, and returns whether there was an edit."""
        return self.store.withdraw_edit(user_id)

    def delete(self, user_id: str) -> bool:
        """Deletes everything about a user, and returns whether there was anything.

        The summary of an inference that is running is not stored.
        """
        return self.store.delete(user_id)

    async def infer(self, user_id: str) -> Interface:
        """Returns the user's summary: as a person edited it, else as inferred from all signals stored so far.

        It is inferred again only if the signals, the templates or the model have changed. Concurrent calls for the
        same user share one inference.

        Raises:
            BackendError: If the inference fails.
        """
        user = self.store.signals(user_id)
        known = self._known(user.user_id, self._key(user))
        return known if known is not None else await self._background.run(self._infer_or_raise(user_id))

    async def respond(
        self,
        user_id: str | None,
        prompt: str,
        *,
        interface: Interface | None = None,
        require_complete: bool = False,
    ) -> Response:
        """Responds to a prompt of a user.

        Args:
            user_id: The user; ``None`` responds to the plain prompt.
            prompt: The prompt.
            interface: A summary to use in place of the user's own.
            require_complete: Whether a response that was truncated, refused or filtered is an error.

        Raises:
            BackendError: If the inference or the response fails, the response is empty, or it is incomplete and
                ``require_complete`` is set.
        """
        return await self._background.run(self._respond_or_raise(user_id, prompt, interface, require_complete))

    async def stream(
        self,
        user_id: str | None,
        prompt: str,
        on_complete: OnComplete = ignore_response,
        *,
        interface: Interface | None = None,
        require_complete: bool = False,
    ) -> AsyncIterator[str]:
        """Responds to a prompt of a user, piece by piece.

        Args:
            user_id: The user; ``None`` responds to the plain prompt.
            prompt: The prompt.
            on_complete: Called with the whole response after the last piece.
            interface: A summary to use in place of the user's own.
            require_complete: Whether a response that was truncated is an error, raised after the last piece.

        Raises:
            BackendError: If the inference or the response fails, or the stream breaks.
        """
        results: list[ChatResult] = []
        pieces = self._stream(user_id, prompt, interface, results.append)
        async with closing(self._background.iterate(pieces)) as iterated:
            async for piece in iterated:
                yield piece
        if not results:
            raise BackendError("the stream ended without a result", failure="malformed")
        outcome = read_response(results[0], user_id)
        on_complete(response_or_raise(outcome, user_id, require_complete=require_complete))

    async def summarize(
        self, users: Iterable[User], *, max_concurrency: int = MAX_CONCURRENCY
    ) -> AsyncIterator[tuple[User, Interface | Failure]]:
        """Infers the summaries of many users, and yields each as soon as it is finished.

        Args:
            users: Ids of stored users, or the signals of users, which are not stored. They are read on demand.
            max_concurrency: Maximum number of users at the same time.

        Yields:
            A user, and the summary or the reason why it failed.

        Raises:
            BackendError: If the backend is not available. All finished results have been yielded by then.
        """
        outcomes = attempts(users, self._summarize, _failed, max_concurrency=max_concurrency)
        async with closing(self._background.iterate(outcomes)) as iterated:
            async for user, outcome in iterated:
                yield user, outcome

    async def respond_many(
        self, items: Iterable[Prompt], *, max_concurrency: int = MAX_CONCURRENCY
    ) -> AsyncIterator[tuple[Prompt, Response | Failure]]:
        """Responds to many prompts, and yields each response as soon as it is finished.

        Args:
            items: Pairs of a user id and a prompt, or prompts with the interface of the user. They are read on demand.
            max_concurrency: Maximum number of prompts at the same time.

        Yields:
            An item, and the response or the reason why it failed.

        Raises:
            BackendError: If the backend is not available. All finished results have been yielded by then.
        """
        outcomes = attempts(items, self._respond_to, _failed, max_concurrency=max_concurrency)
        async with closing(self._background.iterate(outcomes)) as iterated:
            async for item, outcome in iterated:
                yield item, outcome

    def spent(self, user_id: str | None = None) -> Spent:
        """The cost of the requests for a user, or of all requests, for models with a backend file."""
        accounts = [
            ledger.total if user_id is None else ledger.by_user().get(as_user_id(user_id), Spent())
            for ledger in self.ledgers
        ]
        return sum(accounts, Spent())

    def infer_sync(self, user_id: str) -> Interface:
        """The blocking form of :meth:`infer`."""
        return self._background.wait(self._infer_or_raise(user_id))

    def respond_sync(
        self,
        user_id: str | None,
        prompt: str,
        *,
        interface: Interface | None = None,
        require_complete: bool = False,
    ) -> Response:
        """The blocking form of :meth:`respond`."""
        return self._background.wait(self._respond_or_raise(user_id, prompt, interface, require_complete))

    def close_sync(self) -> None:
        """The blocking form of :meth:`close`."""
        self._background.wait(_close(self._backends))
        self._background.stop()

    async def close(self) -> None:
        """Closes the backends and ends the background thread. May be called more than once."""
        await self._background.run(_close(self._backends))
        await asyncio.to_thread(self._background.stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _key(self, user: UserSignals) -> InferenceKey | None:
        if self.inference is None:
            return None
        format = self.inference.format
        template_hash = "" if format is None else format.template_hash
        return InferenceKey(signals_digest=user.digest(), template_hash=template_hash, writer=self.inference.name)

    def _known(self, user_id: str, key: InferenceKey | None) -> Interface | None:
        """The current version, if it is an edit or was inferred with the same key."""
        version = self.store.current(user_id)
        return version.interface if version is not None and (version.is_edit or version.key == key) else None

    # The methods below run on the background loop only.

    async def _infer(self, user_id: str) -> Interface | Failure:
        while True:
            user = self.store.signals(user_id)
            key = self._key(user)
            if (known := self._known(user.user_id, key)) is not None:
                return known
            running = self._running.get(user.user_id)
            inferred = await (self._infer_and_store(user, key) if running is None else asyncio.shield(running))
            # Another caller's inference may have read other signals, or been cancelled together with its caller.
            if inferred is not None and inferred.key == key:
                # A person may have edited the summary during the inference.
                known = self._known(user.user_id, key)
                return inferred.read() if known is None else known

    async def _infer_and_store(self, user: UserSignals, key: InferenceKey | None) -> _Inferred:
        running = self._running[user.user_id] = asyncio.get_running_loop().create_future()
        inferred = None
        try:
            try:
                inferred = _Inferred(key, await self._infer_from(user))
            except Exception as error:
                inferred = _Inferred(key, error)
            if key is not None and not isinstance(inferred.outcome, Failure | Exception):
                self.store.add_inferred(inferred.outcome, key)
        finally:
            del self._running[user.user_id]
            running.set_result(inferred)
        return inferred

    async def _infer_from(self, user: UserSignals) -> Interface | Failure:
        if self.inference is None:
            raise ConfigError("this personalizer has no inference", fix="load it with one, or pass interface=")
        outcome: Interface | Failure
        [outcome] = await self.inference.try_infer([user])
        if outcome.user_id != user.user_id:
            raise PopiError(f"{self.inference.name} inferred {outcome.user_id!r} from the signals of {user.user_id!r}")
        return outcome

    async def _summarize(self, user: str | UserSignals) -> Interface | Failure:
        return await (self._infer(user) if isinstance(user, str) else self._infer_from(user))

    async def _infer_or_raise(self, user_id: str) -> Interface:
        outcome = await self._infer(user_id)
        if isinstance(outcome, Failure):
            raise BackendError(f"no summary of user {outcome.user_id!r}: {outcome.error}", failure=outcome.failure)
        return outcome

    async def _conditioned(
        self, user_id: str | None, prompt: str, interface: Interface | None
    ) -> Conditioned | Failure:
        if interface is None and user_id is not None:
            outcome = await self._infer(user_id)
            if isinstance(outcome, Failure):
                return Failure(outcome.user_id, f"no summary: {outcome.error}", outcome.failure)
            interface = outcome
        return Conditioned(prompt, interface)

    def _generator(self) -> ConditionedGenerator:
        if self.generator is None:
            raise ConfigError("this personalizer has no generator", fix="load it with one")
        return self.generator

    async def _respond(self, user_id: str | None, prompt: str, interface: Interface | None) -> Response | Failure:
        generator = self._generator()
        conditioned = await self._conditioned(user_id, prompt, interface)
        if isinstance(conditioned, Failure):
            return conditioned
        [result] = await generator.respond([conditioned])
        return read_response(result, user_id)

    async def _respond_to(self, item: Conditioned | tuple[str | None, str]) -> Response | Failure:
        if isinstance(item, Conditioned):
            return await self._respond(_user_of(item), item.prompt, item.interface)
        return await self._respond(*item, None)

    async def _respond_or_raise(
        self, user_id: str | None, prompt: str, interface: Interface | None, require_complete: bool
    ) -> Response:
        outcome = await self._respond(user_id, prompt, interface)
        return response_or_raise(outcome, user_id, require_complete=require_complete)

    async def _stream(
        self, user_id: str | None, prompt: str, interface: Interface | None, on_result: Callable[[ChatResult], None]
    ) -> AsyncIterator[str]:
        generator = self._generator()
        conditioned = await self._conditioned(user_id, prompt, interface)
        if isinstance(conditioned, Failure):
            raise BackendError(
                f"no response for user {conditioned.user_id!r}: {conditioned.error}", failure=conditioned.failure
            )
        async with closing(generator.stream(conditioned, on_result)) as pieces:
            async for piece in pieces:
                yield piece


@dataclass(frozen=True, slots=True)
class _Inferred:
    """The end of an inference, for all callers that waited for it."""

    key: InferenceKey | None
    outcome: Interface | Failure | Exception

    def read(self) -> Interface | Failure:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


async def _close(backends: Iterable[Backend]) -> None:
    for backend in backends:
        await backend.close()


def _failed(item: str | UserSignals | Conditioned | tuple[str | None, str], error: BackendError) -> Failure:
    return Failure(_user_of(item) or "", str(error), cast("FailureKind", error.failure))


def _user_of(item: str | UserSignals | Conditioned | tuple[str | None, str]) -> str | None:
    if isinstance(item, UserSignals | Conditioned):
        return item.user_id or None
    user_id = item if isinstance(item, str) else item[0]
    return None if user_id is None else as_user_id(user_id)
