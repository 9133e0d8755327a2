"""What is read of a server's answers, and checked: the SDK takes whatever comes."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError


class Malformed(Exception):
    """What came back is no answer."""


class BrokenOff(Exception):
    """The server has ended an answer before the model did."""


class _Wire(BaseModel):
    model_config = ConfigDict(from_attributes=True, frozen=True)


class Usage(_Wire):
    """The tokens that the server counts; some leave them out, or null."""

    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None


class Message(_Wire):
    """A turn of the model, or a piece of it."""

    content: str | None = None
    refusal: str | None = None


class _Choice(_Wire):
    finish_reason: str | None = None


class ChatChoice(_Choice):
    """An answer to messages."""

    message: Message


class Logprobs(_Wire):
    """In nats; the first token of all has none."""

    token_logprobs: list[float | None] | None = None


class TextChoice(_Choice):
    """What follows token ids; an echo may have no text."""

    text: str | None = None
    logprobs: Logprobs | None = None


class Piece(_Choice):
    """A piece of an answer: a delta to messages, a text to token ids."""

    delta: Message | None = None
    text: str | None = None

    @property
    def content(self) -> str:
        """Its text."""
        return self.text or (self.delta and self.delta.content) or ""

    @property
    def refusal(self) -> str:
        """Of a refusal."""
        return (self.delta and self.delta.refusal) or ""


class _Answer(_Wire):
    usage: Usage | None = None

    @property
    def read(self) -> int:
        """Tokens of the prompt; 0 if the server does not say."""
        return (self.usage and self.usage.prompt_tokens) or 0

    @property
    def written(self) -> int:
        """Tokens of the answer, likewise."""
        return (self.usage and self.usage.completion_tokens) or 0


class ChatAnswer(_Answer):
    """Of the chat completions endpoint."""

    choices: Annotated[list[ChatChoice], Field(min_length=1)]


class TextAnswer(_Answer):
    """Of the completions endpoint."""

    choices: Annotated[list[TextChoice], Field(min_length=1)]


class Chunk(_Answer):
    """Of a stream; one that tells the usage alone has no choices."""

    choices: list[Piece]


Wire = TypeVar("Wire", bound=_Wire)


def read(kind: type[Wire], answer: Any) -> Wire:
    """Reads what the SDK has made of an answer.

    Raises:
        Malformed: If it is none of this kind.
    """
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Malformed(f"{where}: {first['msg']}" if where else str(answer)) from None
