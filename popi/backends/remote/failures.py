"""What the failures of a server mean."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import openai

from popi.backends.base import FailureKind
from popi.backends.remote.wire import BrokenOff, Malformed
from popi.errors import BackendError, one_line

LONGEST = 300
"""Characters of what a server says of its failure."""

OF_THE_BACKEND = {401, 403, 404}
"""Status codes that every request would get: a wrong key, no right to the model, no such model or path."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that failed.

    Attributes:
        kind: Of what kind the failure is.
        error: One line.
        retry_after: After how many seconds the server wants to be asked again, if it said so.
        whole: Whether every other request would fail alike.
    """

    kind: FailureKind
    error: str
    retry_after: float | None = None
    whole: bool = False

    def raised(self, model: str) -> BackendError:
        """The same as an exception."""
        return BackendError(f"{model}: {self.error}", failure=self.kind, retry_after=self.retry_after)


def failed(error: Exception, seconds: float) -> Failed:
    """Reads an exception of the SDK, of a parser or of a deadline.

    Args:
        error: The exception.
        seconds: How long the request was waited for at most.

    Raises:
        Exception: The same one, if it is of none of these kinds.
    """
    match error:
        case openai.APITimeoutError() | TimeoutError():
            return Failed("timeout", f"no answer within {seconds:g} s")
        case openai.APIStatusError():
            return _of_status(error)
        # A body may end within a character.
        case openai.APIResponseValidationError() | json.JSONDecodeError() | UnicodeDecodeError() | Malformed():
            return Failed("malformed", f"what came back is no answer: {_short(str(error))}")
        case openai.APIConnectionError():
            cause = error.__cause__ or error
            return Failed("unreachable", f"the server cannot be reached: {_short(str(cause) or type(cause).__name__)}")
        case BrokenOff():
            return Failed("server", str(error))
        case openai.APIError():
            return Failed("server", _short(error.message))
        case _:
            raise error


def _of_status(error: openai.APIStatusError) -> Failed:
    status, message = error.status_code, _short(f"{error.status_code}: {_said(error)}")
    later = retry_after(error.response.headers)
    if status in OF_THE_BACKEND or error.code == "insufficient_quota":
        return Failed("denied", message, whole=True)
    if status == 429:
        return Failed("rate_limit", message, later)
    if status == 408:
        return Failed("timeout", message, later)
    if status >= 500 or status == 409:
        return Failed("server", message, later)
    return Failed("request", message)


def _said(error: openai.APIStatusError) -> str:
    """What the server said, without the SDK's frame around it; a page for people is worth no more than its status."""
    body = error.body
    said = body.get("message") if isinstance(body, Mapping) else body
    words = said if isinstance(said, str) else error.message
    return error.response.reason_phrase if "<html" in words.lower() else words


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds until the server wants to be asked again, by its headers; ``None`` if it does not say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except ValueError:
        return None


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
