"""Types of the parts of a server's response that popi reads.

A whole response is read as a stream of one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, field_validator

from popi.backends.remote.failures import Malformed


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Details(_Wire):
    reasoning_tokens: NonNegativeInt | None = None


class Usage(_Wire):
    """Token counts. Servers may leave them out or send null."""

    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None
    completion_tokens_details: _Details | None = None


class Part(_Wire):
    """A part of a content: text, reasoning, a refusal or another type."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(_Wire):
    """A turn of the model, or a piece of it."""

    content: str | list[Part] | None = None
    refusal: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None
    function_call: Any = None


class Logprobs(_Wire):
    """Log-probabilities in nats. The first token of a prompt has none."""

    token_logprobs: list[float | None] | None = None


class Choice(_Wire):
    """A response, or a piece of one: a message, a piece of a message, or a text."""

    index: int | None = None
    finish_reason: str | None = None
    message: Message | None = None
    delta: Message | None = None
    text: str | None = None
    logprobs: Logprobs | None = None

    @property
    def is_response(self) -> bool:
        """Whether it has a message or a text, even if the value is null."""
        return not self.model_fields_set.isdisjoint(("message", "delta", "text"))

    @property
    def turn(self) -> Message:
        """The message, or the piece of one."""
        return self.delta or self.message or Message(content=self.text)

    @property
    def content(self) -> str:
        """The text. Parts of other types do not belong to it."""
        content = self.turn.content
        if isinstance(content, list):
            return "".join(part.text or "" for part in content if part.type in ("text", "output_text"))
        return content or ""

    @property
    def refusal(self) -> str:
        """The text of a refusal."""
        content = self.turn.content
        parts = content if isinstance(content, list) else ()
        return "".join([self.turn.refusal or "", *(part.refusal or "" for part in parts)])

    @property
    def reasons(self) -> bool:
        """Whether it contains reasoning in a separate field."""
        content = self.turn.content
        parts = content if isinstance(content, list) else ()
        apart = self.turn.reasoning or self.turn.reasoning_content
        return bool(apart) or any(part.type in ("thinking", "reasoning") for part in parts)

    @property
    def calls_tools(self) -> bool:
        """Whether it calls a tool."""
        return bool(self.turn.tool_calls or self.turn.function_call)


class Chunk(_Wire):
    """A whole response, or a piece of a stream. A piece that only reports usage has no choices."""

    choices: list[Choice] = []
    usage: Usage | None = None

    @property
    def first(self) -> Choice | None:
        """The first of several responses: servers may send more than requested."""
        return next((choice for choice in self.choices if not choice.index), None)

    @field_validator("choices", mode="before")
    @classmethod
    def _none_is_empty(cls, choices: Any) -> Any:
        return [] if choices is None else choices

    @field_validator("usage", mode="before")
    @classmethod
    def _other_usage_is_none(cls, usage: Any) -> Any:
        return usage if isinstance(usage, Mapping) else None


Wire = TypeVar("Wire", bound=_Wire)


def read(kind: type[Wire], body: Any) -> Wire:
    """Reads the parsed body of a response.

    Raises:
        Malformed: If it does not follow the protocol.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Malformed(f"{where}: {first['msg']}" if where else "the body is not an object") from None
