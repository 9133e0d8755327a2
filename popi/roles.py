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
from popi.prompts import CUSTOM, Message, PromptSet
from popi.signals import Statement, UserSignals
from popi.summary import Author, PreferenceSummary, Provenance, summarize_claims

Inferred = TypeVar("Inferred", bound=Interface, default=PreferenceSummary, covariant=True)
"""The type that an inference infers, by default a summary."""

DEFAULT_CONTEXT_TOKENS = 4096
"""Default maximum number of tokens of signals, or of a summary, that a model is shown."""

TEMPLATE_TOKENS = 64
"""Estimated number of tokens that a chat template adds to a conversation."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a user has no summary or response.

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
        shown: The signal id of each number that the writer can cite.
    """

    user: UserSignals
    messages: tuple[Message, ...]
    shown: tuple[str, ...]


class SummaryFormat(ABC):
    """Renders the request for a summary and parses the reply. It does not call a model.

    Example:
        >>> from popi.summary import Author, PreferenceSummary, Provenance
        >>> class OneLine(SummaryFormat):
        ...     def render(self, user):
        ...         words = " ".join(signal.text for signal in user.signals if signal.kind == "statement")
        ...         return SummaryPrompt(user, (Message("user", f"Summarize: {words}"),), ()) if words else None
        ...
        ...     def parse(self, prompt, reply, *, truncated=False):
        ...         user_id = prompt.user.user_id
        ...         if truncated:
        ...             return Failure(user_id, "the reply was truncated")
        ...         made = Provenance(author=Author.INFERRED, template_hash=self.template_hash)
        ...         return PreferenceSummary(user_id=user_id, text=reply, provenance=made)
        >>> user = UserSignals(user_id="ann", signals=(Statement(text="I like short answers."),))
        >>> prompt = OneLine().render(user)
        >>> prompt.messages[0].content
        'Summarize: I like short answers.'
        >>> OneLine().parse(prompt, "short answers").text
        'short answers'

    Attributes:
        prompts: The prompt set that it renders; ``None`` if it has templates of its own.
    """

    prompts: PromptSet | None = None

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
        """Identifies the templates. The default is a hash of the messages for a fixed user."""
        prompt = self.render(UserSignals(user_id="user", signals=(Statement(id="1", text="I like short answers."),)))
        return _hash_messages([] if prompt is None else [prompt.messages])


class AnswerFormat(ABC):
    """Renders a prompt together with the interface of a user. It does not call a model.

    Example:
        >>> class Appended(AnswerFormat):
        ...     def render(self, prompt, interface):
        ...         return [Message("user", prompt if interface is None else f"{prompt} ({interface.text})")]
        >>> Appended().render("What is tea?", None)
        [Message(role='user', content='What is tea?')]
        >>> Appended().template_hash.startswith("custom-")
        True

    Attributes:
        prompts: The prompt set that it renders; ``None`` if it has templates of its own.
    """

    prompts: PromptSet | None = None

    @abstractmethod
    def render(self, prompt: str, interface: Interface | None) -> list[Message]:
        """Renders a conversation.

        Args:
            prompt: The user's prompt.
            interface: The summary or embedding of the user; ``None`` gives the plain prompt.
        """

    @property
    def max_context_tokens(self) -> int | None:
        """Maximum number of tokens of an interface in the rendered messages; ``None`` is unlimited."""
        return None

    @property
    def template_hash(self) -> str:
        """Identifies the templates. The default is a hash of the messages for a fixed prompt and summary."""
        probe = PreferenceSummary(user_id="user", text="- short", provenance=Provenance(author=Author.ORACLE))
        return _hash_messages([self.render("prompt", None), self.render("prompt", probe)])


def _hash_messages(conversations: Sequence[Sequence[Message]]) -> str:
    content = json.dumps([[asdict(message) for message in messages] for messages in conversations])
    return CUSTOM + hashlib.sha256(content.encode()).hexdigest()[:12]


class PreferenceInference(ABC, Generic[Inferred]):
    """Reads users' signals and writes their summaries, q(z | s). It never sees a prompt of the user.

    A subclass of ``PreferenceInference[UserEmbedding]`` infers embeddings instead.

    Example:
        >>> import asyncio
        >>> class Statements(PreferenceInference):
        ...     name = "statements"
        ...
        ...     async def infer(self, users):
        ...         made = Provenance(author=Author.BASELINE, model=self.name)
        ...         return [
        ...             PreferenceSummary(user_id=user.user_id, text=user.signals[-1].text, provenance=made)
        ...             for user in users
        ...         ]
        >>> user = UserSignals(user_id="ann", signals=(Statement(text="I like short answers."),))
        >>> [summary] = asyncio.run(Statements().infer([user]))
        >>> summary.text
        'I like short answers.'

    Attributes:
        name: Name in tables and provenance.
        kind: The kind of interface that it infers.
        format: Renders requests and parses replies; ``None`` if no model writes the summaries. Only an inference with a
            format can be trained.
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

    For training and evaluation, where failures of a weak writer must not stop the run.

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
    """A prompt and the interface of the user; ``None`` is the plain prompt."""

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

    Example:
        >>> import asyncio
        >>> class Echo(ConditionedGenerator):
        ...     name = "echo"
        ...
        ...     async def respond(self, items):
        ...         return [ChatResult(item.prompt, "stop") for item in items]
        ...
        ...     async def stream(self, item, on_complete=ignore_result):
        ...         [result] = await self.respond([item])
        ...         yield result.text
        ...         on_complete(result)
        ...
        ...     async def score(self, items):
        ...         return [ScoreResult.failed("not supported", "request", model=self.name) for item in items]
        >>> [result] = asyncio.run(Echo().respond([Conditioned("What is tea?")]))
        >>> result.text
        'What is tea?'

    Attributes:
        name: Name in tables.
        interfaces: The kinds of interface that it reads.
        format: Renders prompts; ``None`` if they are not rendered as messages. Only a generator with a format can be
            trained.
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
        max_tokens: Number of tokens to leave for the reply.
        requested: An explicit limit; ``None`` uses the free part of the context, up to ``DEFAULT_CONTEXT_TOKENS``.
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
            f"the context of {backend.model} ({window} tokens) has no room for prompt and {max_tokens} new tokens",
            fix="lower max_tokens or use a model with a longer context",
        )
    if requested is not None and requested > room:
        raise ConfigError(
            f"{requested} tokens do not fit the context of {backend.model}, which has room for {room}",
            field=field,
            fix=f"use at most {room}",
        )
    return requested or min(room, DEFAULT_CONTEXT_TOKENS)
