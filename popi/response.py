"""A response to a user, and the errors of empty and incomplete responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from popi.backends.base import ChatResult, FailureKind, FinishReason
from popi.errors import BackendError
from popi.roles import Failure


@dataclass(frozen=True, slots=True)
class Response:
    """A response. ``str()`` of it is the text.

    Example:
        >>> response = Response("Poles attract.", "stop", prompt_tokens=20, completion_tokens=4, model="m")
        >>> print(response, response.is_complete)
        Poles attract. True

    Attributes:
        text: The text; never empty.
        finish_reason: ``stop``; ``length`` if it was truncated at ``max_tokens``; ``refused`` if the model refused;
            ``filtered`` if a content filter removed its end.
        prompt_tokens: Length of the rendered conversation.
        completion_tokens: Number of new tokens.
        model: The model that responded.
        route: The route that served the request, if there are several.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    model: str
    route: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def is_complete(self) -> bool:
        """Whether the model ended the response itself."""
        return self.finish_reason == "stop"


OnComplete = Callable[[Response], None]
"""Called once at the end of a stream."""


def ignore_response(response: Response) -> None:
    """The default ``on_complete``: does nothing."""


def read_response(result: ChatResult, user_id: str | None) -> Response | Failure:
    """Makes a response from a backend's result, or a failure if the item failed or has no text."""
    failed = result.error is not None and result.finish_reason not in ("refused", "filtered")
    if failed or not result.text.strip():
        kind: FailureKind | None = result.failure or (None if failed else "empty")
        return Failure(user_id or "", result.error or "the response is empty", kind)
    return Response(
        text=result.text,
        finish_reason=result.finish_reason,
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.completion_tokens,
        model=result.model,
        route=result.route,
    )


def response_or_raise(outcome: Response | Failure, user_id: str | None, *, require_complete: bool) -> Response:
    """Returns a response, or raises the error of a failure.

    Raises:
        BackendError: If it failed, or it is incomplete and ``require_complete`` is set.
    """
    to = "" if user_id is None else f" for user {user_id!r}"
    if isinstance(outcome, Failure):
        raise BackendError(f"no response{to}: {outcome.error}", failure=outcome.failure)
    if require_complete and not outcome.is_complete:
        raise BackendError(f"the response{to} is incomplete: {incompleteness(outcome)}", failure="withheld")
    return outcome


def incompleteness(response: Response) -> str:
    """Says why a response is incomplete, and which option to change."""
    match response.finish_reason:
        case "length":
            return f"it was truncated after {response.completion_tokens} tokens; raise max_tokens"
        case "filtered":
            return "a content filter removed a part of it"
        case _:
            return "the model refused"
