"""The two roles: writing summaries, and responding under them. Any backend can play either role.

A role has two parts. Its *format* is pure: it renders messages and parses text. The role itself adds a backend.
Training uses the same format object as serving, so a model is trained on the messages that it is served with.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Generic

from typing_extensions import TypeVar

from popi.backends.base import Backend, ChatResult, FailureKind, InterfaceKind, OnComplete, ScoreResult, ignore_result
from popi.errors import ConfigError, ModelError
from popi.interface import Interface
from popi.prompts import CUSTOM, Message
from popi.signals import Statement, UserSignals
from popi.summary import Author, PreferenceSummary, Provenance, summarize_claims

Inferred = TypeVar("Inferred", bound=Interface, default=PreferenceSummary, covariant=True)
"""What an inference infers: a summary, unless it says otherwise."""

DEFAULT_CONTEXT_TOKENS = 4096
"""Default maximum number of tokens of signals, or of a summary, that a model is shown."""

TEMPLATE_TOKENS = 64
"""Room for the tokens that a chat template adds around a conversation, by judgement."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a user has no summary or response.

    Example:
        >>> outcomes = [Failure("ann", "the reply is empty")]
        >>> [outcome.error for outcome in outcomes if isinstance(outcome, Failure)]
        ['the reply is empty']

    Attributes:
        user_id: The user.
        error: One line.
        failure: The kind of failure of the backend; ``None`` if it responded, but not with a summary.
    """

    user_id: str
    error: str
    failure: FailureKind | None = None


@dataclass(frozen=True, slots=True)
class SummaryPrompt:
    """The request for one user's summary.

    Attributes:
        user: The user.
        messages: The conversation that the writer continues.
        shown: The signal id behind each number that the writer can cite.
    """

    user: UserSignals
    messages: tuple[Message, ...]
    shown: tuple[str, ...]


class SummaryFormat(ABC):
    """How a summary is requested and how the reply is read: messages out, text in. It calls no model."""

    @abstractmethod
    def render(self, user: UserSignals) -> SummaryPrompt | None:
        """Renders the request for a user's summary; ``None`` if the user has no evidence to summarize."""

    @abstractmethod
    def parse(self, prompt: SummaryPrompt, reply: str, *, truncated: bool = False) -> PreferenceSummary | Failure:
        """Reads a writer's reply.

        Args:
            prompt: The request.
            reply: The text of the reply.
            truncated: Whether the reply reached ``max_tokens``.

        Returns:
            The summary, or why the reply is not one.
        """

    @property
    def template_hash(self) -> str:
        """Identifies the templates. The default hashes what :meth:`render` makes of a fixed user."""
        prompt = self.render(UserSignals(user_id="user", signals=(Statement(id="1", text="I like short answers."),)))
        return _hash_messages([] if prompt is None else [prompt.messages])


class AnswerFormat(ABC):
    """How a prompt is put to a generator under what is known about the user. It calls no model."""

    @abstractmethod
    def render(self, prompt: str, interface: Interface | None) -> list[Message]:
        """Renders a conversation.

        Args:
            prompt: The user's prompt.
            interface: What the generator reads about the user; ``None`` gives the plain prompt.
        """

    @property
    def max_context_tokens(self) -> int | None:
        """Maximum number of tokens of an interface in the rendered messages; ``None`` is unlimited."""
        return None

    @property
    def template_hash(self) -> str:
        """Identifies the templates. The default hashes what :meth:`render` makes of a fixed prompt and summary."""
        probe = PreferenceSummary(user_id="user", text="- short", provenance=Provenance(author=Author.ORACLE))
        return _hash_messages([self.render("prompt", None), self.render("prompt", probe)])


def _hash_messages(conversations: Sequence[Sequence[Message]]) -> str:
    content = json.dumps([[asdict(message) for message in messages] for messages in conversations])
    return CUSTOM + hashlib.sha256(content.encode()).hexdigest()[:12]


class PreferenceInference(ABC, Generic[Inferred]):
    """Reads users' signals and writes their summaries, q(z | s). It never sees a prompt of the user.

    A subclass of ``PreferenceInference[UserEmbedding]`` infers embeddings instead.

    Attributes:
        name: Name in tables and provenance.
        kind: The kind of interface that it infers.
        format: How summaries are requested and read; ``None`` if no model writes them. Only an inference with a format
            can be trained.
    """

    name: str
    kind: InterfaceKind = "summary"
    format: SummaryFormat | None = None

    @abstractmethod
    async def infer(self, users: Sequence[UserSignals]) -> list[Inferred]:
        """Writes one summary for each user, in order.

        Raises:
            BackendError: If the backend is not available, or a user's summary fails.
        """

    async def try_infer(self, users: Sequence[UserSignals]) -> list[Inferred | Failure]:
        """Writes one summary for each user, in order; a failed one is data in its place.

        Raises:
            BackendError: If the backend is not available.
        """
        return list(await self.infer(users))


async def infer_or_nothing(
    inference: PreferenceInference, users: Sequence[UserSignals]
) -> tuple[list[PreferenceSummary], list[Failure]]:
    """Writes one summary for each user; a failed one becomes the summary that says "not enough evidence".

    For training and evaluation, where a weak writer must not end the work.

    Returns:
        The summaries, in order, and the failures.

    Raises:
        BackendError: If the backend is not available.
    """
    outcomes = await inference.try_infer(users)
    made = Provenance(author=Author.INFERRED, model=inference.name)
    summaries = [
        summarize_claims(user.user_id, (), made.model_copy(update={"signals_digest": user.digest()}))
        if isinstance(outcome, Failure)
        else outcome
        for user, outcome in zip(users, outcomes, strict=True)
    ]
    return summaries, [outcome for outcome in outcomes if isinstance(outcome, Failure)]


@dataclass(frozen=True, slots=True)
class Conditioned:
    """A prompt and what the generator reads about the user; ``None`` is the plain prompt."""

    prompt: str
    interface: Interface | None = None

    @property
    def user_id(self) -> str:
        """The user, or an empty string."""
        return "" if self.interface is None else self.interface.user_id


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response to score under a conditioned prompt."""

    given: Conditioned
    response: str


class ConditionedGenerator(ABC):
    """Responds to prompts under an interface, pi(y | x, z).

    Attributes:
        name: Name in tables.
        interfaces: The kinds of interface that it reads.
        format: How prompts are rendered; ``None`` if not by messages. Only a generator with a format can be trained.
    """

    name: str
    interfaces: frozenset[InterfaceKind] = frozenset({"summary"})
    format: AnswerFormat | None = None

    @abstractmethod
    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        """Responds to each prompt.

        Raises:
            BackendError: If the backend is not available.
        """

    @abstractmethod
    def stream(self, item: Conditioned, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Responds to one prompt, piece by piece.

        Args:
            item: The prompt.
            on_complete: Called once at the end, with the result that :meth:`respond` would return.

        Raises:
            BackendError: If the request fails or the stream breaks.
        """

    @abstractmethod
    async def score(self, items: Sequence[Candidate]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, in nats.

        Raises:
            BackendError: If the backend is not available or does not support scoring.
        """


def context_budget(
    backend: Backend, frame: Sequence[Message], max_tokens: int, requested: int | None = None, *, field: str = "budget"
) -> int:
    """Maximum number of tokens of signals, or of a summary, inside a frame.

    Args:
        backend: The backend of the model that reads them.
        frame: The conversation around them.
        max_tokens: Room for the reply.
        requested: An explicit limit; ``None`` takes what fits, up to ``DEFAULT_CONTEXT_TOKENS``.
        field: Name of the option, for errors.

    Raises:
        ConfigError: If the requested limit is not positive or does not fit.
        ModelError: If nothing fits.
    """
    if requested is not None and requested <= 0:
        raise ConfigError(f"must be positive, not {requested}", field=field)
    window = backend.capabilities.context_length
    if window is None:
        return requested or DEFAULT_CONTEXT_TOKENS
    around = sum(backend.count_tokens(message.content) for message in frame)
    room = window - max_tokens - around - TEMPLATE_TOKENS
    if room <= 0:
        raise ModelError(
            f"the context of {backend.model} ({window} tokens) has no room beside a reply of {max_tokens} tokens",
            fix="lower max_tokens or use a model with a longer context",
        )
    if requested is not None and requested > room:
        raise ConfigError(
            f"{requested} tokens do not fit the context of {backend.model}, which has room for {room}",
            field=field,
            fix=f"use at most {room}",
        )
    return requested or min(room, DEFAULT_CONTEXT_TOKENS)
