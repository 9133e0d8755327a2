"""Classifies the errors of a server."""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from openai import APIConnectionError

from popi.backends.base import FailureKind
from popi.errors import BackendError, one_line

MAX_CHARACTERS = 300
"""Maximum length of a server's message in an error."""

DENIED = {401, 402, 403, 404}
"""Statuses that every request would get: a wrong key, no credit, no access to the model, no such model or path."""

CODES: dict[str, FailureKind] = {
    "insufficient_quota": "denied",
    "invalid_api_key": "denied",
    "authentication_error": "denied",
    "permission_error": "denied",
    "model_not_found": "denied",
    "rate_limit_exceeded": "rate_limit",
    "rate_limit_error": "rate_limit",
    "context_length_exceeded": "request",
    "invalid_request_error": "request",
}
"""Failures by code or type of the error, for errors whose status is ambiguous."""


class Malformed(Exception):
    """The response does not follow the protocol."""


class Stopped(Exception):
    """The server stopped a response before the model ended it."""


class Rejected(Exception):
    """The server responded with an error.

    Args:
        message: The server's own message, without secrets.
        status: The HTTP status, or the number in the body of a response with status 200.
        codes: Code and type of the error.
        fields: Request fields that the error points to.
        retry_after: Seconds to wait before a retry, if the server sent them.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        codes: tuple[str, ...] = (),
        fields: tuple[str, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.codes, self.fields = message, status, codes, fields
        self.retry_after = retry_after

    @property
    def kind(self) -> FailureKind:
        """The kind of failure."""
        if "insufficient_quota" in self.codes or self.status in DENIED:
            return "denied"
        if self.status == 429:
            return "rate_limit"
        if self.status == 408:
            return "timeout"
        if self.status == 409 or self.status >= 500:
            return "server"
        if self.status >= 300:
            return "request"
        return next((CODES[code] for code in self.codes if code in CODES), "server")


def rejection(
    body: Any, *, status: int, headers: Mapping[str, str], redact: Callable[[str], str], reason: str = ""
) -> Rejected | None:
    """Reads the error of a response, in any of the forms that servers use.

    Args:
        body: The parsed body, or its text if it is not JSON.
        status: The HTTP status.
        headers: The headers of the response.
        redact: Hides secrets in a text.
        reason: Used if the body has no message, or is an HTML page.

    Returns:
        The error, or ``None`` for a body without one in a response with status 200.
    """
    error = body.get("error") if isinstance(body, Mapping) else None
    detail = error if isinstance(error, Mapping) else body if isinstance(body, Mapping) else {}
    message = _message(body) or (f"no message, only {dict(error)}" if isinstance(error, Mapping) and error else None)
    if message is None and status < 300:
        return None
    codes = tuple(str(detail[name]) for name in ("code", "type") if detail.get(name))
    if status < 300:
        status = next((int(code) for code in codes if code.isascii() and code.isdigit()), status)
        message = f"error {status}: {message}" if status >= 300 else message
    else:
        message = f"HTTP {status}: {message or reason}"
    return Rejected(
        _short(redact(message or "")),
        status=status,
        codes=codes,
        fields=tuple(_fields(detail)),
        retry_after=retry_after(headers),
    )


def _message(body: Any) -> str | None:
    """The message of an error; ``None`` if it has no message."""
    if isinstance(body, str):
        return body if body.strip() and "<html" not in body.lower() else None
    if isinstance(body, list):
        return "; ".join(filter(None, map(_message, body))) or None
    if not isinstance(body, Mapping):
        return None
    if isinstance(body.get("msg"), str):
        place = ".".join(str(part) for part in body.get("loc") or () if part != "body")
        return f"{place}: {body['msg']}" if place else str(body["msg"])
    names = ("error", "detail", "errors", "message") if "choices" not in body else ("error",)
    return next(filter(None, (_message(body.get(name)) for name in names)), None)


def _fields(error: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(error.get("param"), str):
        yield error["param"]
    details = error.get("detail")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, Mapping):
            yield from (part for part in detail.get("loc") or () if isinstance(part, str) and part != "body")


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that failed.

    Attributes:
        kind: The kind of failure.
        error: One line.
        retry_after: Seconds to wait before a retry, if the server sent them.
    """

    kind: FailureKind
    error: str
    retry_after: float | None = None

    def raised(self, model: str) -> BackendError:
        """Returns the failure as an exception."""
        return BackendError(f"{model}: {self.error}", failure=self.kind, retry_after=self.retry_after)


def failed(error: Exception, *, url: str, timeout: float, redact: Callable[[str], str]) -> Failed:
    """Reads an exception of the SDK, of the HTTP library, of a parser or of a timeout.

    Args:
        error: The exception.
        url: Where the request was sent.
        timeout: Seconds after which it timed out.
        redact: Hides secrets in a text.

    Raises:
        Exception: ``error`` itself, if it is of another kind.
    """
    # The message of the SDK is only "Connection error."
    if isinstance(error, APIConnectionError) and isinstance(error.__cause__, httpx2.HTTPError | OSError):
        error = error.__cause__
    causes = list(_causes(error))
    why = _short(redact(next((str(cause) for cause in causes if str(cause)), type(error).__name__)))
    match error:
        case httpx2.TimeoutException() | TimeoutError():
            return Failed("timeout", f"no response within {timeout:g} s")
        case Rejected():
            return Failed(error.kind, error.message, error.retry_after)
        case Malformed() | httpx2.DecodingError():
            return Failed("malformed", f"malformed response: {why}")
        case Stopped():
            return Failed("server", why)
        case httpx2.TransportError() if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
            return Failed("denied", f"the certificate of {url} is not valid: {why}")
        case httpx2.TransportError() if any(_is_unknown_host(cause) for cause in causes):
            return Failed("denied", f"the host of {url} is unknown: {why}")
        # Another attempt would fail in the same way, before anything is sent. anyio raises a group if connecting fails
        # with an exception other than an OSError.
        case (
            ExceptionGroup()
            | httpx2.LocalProtocolError()
            | httpx2.UnsupportedProtocol()
            | httpx2.TooManyRedirects()
            | httpx2.InvalidURL()
        ):
            return Failed("denied", f"requests to {url} cannot be sent: {why}")
        # An error of TLS inside a body has no type of the HTTP library.
        case httpx2.TransportError() | APIConnectionError() | OSError():
            return Failed("unreachable", f"connection to {url} failed: {why}")
        case ValueError():
            return Failed("request", f"the request cannot be sent: {why}")
        case _:
            raise error


def _is_unknown_host(error: BaseException) -> bool:
    """Whether the host does not exist. A name server that does not respond is a transient failure."""
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait before a retry, from the headers; ``None`` if the server did not send them."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]}..."
