"""The state of a personalizer: the signals of users, and the versions of their summaries."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from pydantic import BaseModel, Field

from popi.backends.sharing import renew_after_fork
from popi.interface import Interface
from popi.signals import FROZEN, Signal, UserSignals, as_user_id
from popi.summary import NO_EVIDENCE, Author, PreferenceSummary, Provenance


class InferenceKey(BaseModel):
    """Everything that an inferred summary depends on. If it changes, the summary is inferred again.

    Attributes:
        signals_digest: ``UserSignals.digest()`` of the signals.
        template_hash: Hash of the prompt templates; empty if no model is prompted.
        writer: Name of the inference.
    """

    model_config = FROZEN

    signals_digest: str
    template_hash: str
    writer: str


class Version(BaseModel):
    """One version of a user's summary or embedding.

    Attributes:
        number: Number of the version, starting at 1.
        interface: The summary, or the embedding.
        key: The inputs of the inference; ``None`` for an edit by a person.
        withdrawn: Whether this is an edit that was withdrawn.
        time: Time at which it was stored, in UTC.
    """

    model_config = FROZEN

    number: int = Field(ge=1)
    interface: Interface
    key: InferenceKey | None = None
    withdrawn: bool = False
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def is_edit(self) -> bool:
        """Whether a person wrote it and did not withdraw it."""
        return self.key is None and not self.withdrawn


class Store(Protocol):
    """The interface of a personalizer's storage.

    All methods may be called from any thread, also on an event loop, and return quickly. Each one is atomic, and a user
    id is the same with and without surrounding white space. A forked child can keep using the store. Whether it shares
    its content with its parent depends on the store.

    Example:
        A store that reports deletions:

        >>> class Reporting(InMemoryStore):
        ...     def delete(self, user_id):
        ...         print("deleting", user_id)
        ...         return super().delete(user_id)
        >>> store: Store = Reporting()
        >>> store.delete("ann")
        deleting ann
        False
    """

    def users(self) -> list[str]:
        """The ids of all users, in the order in which they were first stored."""

    def signals(self, user_id: str) -> UserSignals:
        """The signals of a user; none if the user is unknown."""

    def add_signals(self, user_id: str, *signals: Signal) -> UserSignals:
        """Adds signals, and returns all signals of the user. A signal that is already stored is not repeated.

        Raises:
            InputError: If a new signal has the id of a different one. No signal is added then.
        """

    def history(self, user_id: str) -> tuple[Version, ...]:
        """All versions of a user, oldest first."""

    def current(self, user_id: str) -> Version | None:
        """The current version, as :func:`current_version` defines it; ``None`` if there is no version."""

    def add_inferred(self, interface: Interface, key: InferenceKey) -> Version | None:
        """Adds an inferred version, unless the signals of the user have changed since the inference.

        Therefore nothing is stored about a user who was deleted during the inference.

        Returns:
            The new version; ``None`` if it was not stored.
        """

    def edit(self, user_id: str, text: str) -> Version:
        """Adds a person's text as the current version, as :func:`edited_summary` makes it."""

    def withdraw_edit(self, user_id: str) -> bool:
        """Withdraws all edits of a user, and returns whether there was one."""

    def delete(self, user_id: str) -> bool:
        """Deletes everything about a user, and returns whether there was anything."""


def current_version(history: Sequence[Version]) -> Version | None:
    """The last edit that was not withdrawn; without edits, the last inferred version."""
    edits = [version for version in history if version.is_edit]
    inferred = [version for version in history if version.key is not None]
    return next(reversed(edits or inferred), None)


def edited_summary(user: UserSignals, current: Version | None, text: str) -> PreferenceSummary:
    """Makes a summary of a person's text. Claims of the current summary that are unchanged keep their evidence.

    Args:
        user: The signals of the user.
        current: The version that the person edited, if there is one.
        text: The text of the person.
    """
    if current is not None and isinstance(current.interface, PreferenceSummary):
        return current.interface.edit(text)
    made = Provenance(author=Author.EDITED, signals_digest=user.digest())
    return PreferenceSummary(user_id=user.user_id, text=NO_EVIDENCE, provenance=made).edit(text)


@dataclass(frozen=True, slots=True)
class _User:
    signals: UserSignals
    history: tuple[Version, ...] = ()


class InMemoryStore:
    """Keeps everything in the memory of this process. A forked child has its own copy.

    Example:
        >>> from popi import Statement
        >>> store = InMemoryStore()
        >>> user = store.add_signals("ann", Statement(text="I like short answers."))
        >>> store.edit("ann", "- short answers").number
        1
        >>> store.users(), store.delete("ann"), store.users()
        (['ann'], True, [])
    """

    def __init__(self) -> None:
        # Each change replaces one frozen value, so that a fork copies the state before or after a change.
        self._users: dict[str, _User] = {}
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Replaces the lock, which a thread of the parent process may hold."""
        self._lock = threading.Lock()

    def users(self) -> list[str]:
        """See :meth:`Store.users`."""
        with self._lock:
            return list(self._users)

    def signals(self, user_id: str) -> UserSignals:
        """See :meth:`Store.signals`."""
        return self._user(as_user_id(user_id)).signals

    def add_signals(self, user_id: str, *signals: Signal) -> UserSignals:
        """See :meth:`Store.add_signals`."""
        user_id = as_user_id(user_id)
        with self._lock:
            user = self._user(user_id)
            if signals:
                user = self._users[user_id] = replace(user, signals=user.signals.add(*signals))
            return user.signals

    def history(self, user_id: str) -> tuple[Version, ...]:
        """See :meth:`Store.history`."""
        return self._user(as_user_id(user_id)).history

    def current(self, user_id: str) -> Version | None:
        """See :meth:`Store.current`."""
        return current_version(self.history(user_id))

    def add_inferred(self, interface: Interface, key: InferenceKey) -> Version | None:
        """See :meth:`Store.add_inferred`."""
        user_id = as_user_id(interface.user_id)
        with self._lock:
            user = self._users.get(user_id)
            if user is None or user.signals.digest() != key.signals_digest:
                return None
            return self._append(user, interface, key)

    def edit(self, user_id: str, text: str) -> Version:
        """See :meth:`Store.edit`."""
        with self._lock:
            user = self._user(as_user_id(user_id))
            return self._append(user, edited_summary(user.signals, current_version(user.history), text), None)

    def withdraw_edit(self, user_id: str) -> bool:
        """See :meth:`Store.withdraw_edit`."""
        user_id = as_user_id(user_id)
        with self._lock:
            user = self._user(user_id)
            if not any(version.is_edit for version in user.history):
                return False
            history = [
                version.model_copy(update={"withdrawn": True}) if version.is_edit else version
                for version in user.history
            ]
            self._users[user_id] = replace(user, history=tuple(history))
            return True

    def delete(self, user_id: str) -> bool:
        """See :meth:`Store.delete`."""
        with self._lock:
            return self._users.pop(as_user_id(user_id), None) is not None

    def _user(self, user_id: str) -> _User:
        return self._users.get(user_id) or _User(UserSignals(user_id=user_id))

    def _append(self, user: _User, interface: Interface, key: InferenceKey | None) -> Version:
        version = Version(number=len(user.history) + 1, interface=interface, key=key)
        self._users[user.signals.user_id] = replace(user, history=(*user.history, version))
        return version
