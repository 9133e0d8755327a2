"""HTTP: sends a request, and reads the JSON or the server-sent events of its response."""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Final

import httpx

from popi.backends.remote.failures import Malformed, Rejected, rejection
from popi.backends.remote.server import Server
from popi.backends.together import closing
from popi.errors import ConfigError

DONE: Final = object()
"""Yielded after the last body of a complete response."""

BOM = b"\xef\xbb\xbf"
EVENT = re.compile(rb"(data|event|id|retry)?:")
"""Matches the start of a stream of server-sent events: a field or a comment."""

HEAD_BYTES = len("event:")
"""Number of bytes that distinguish such a stream from JSON."""

DRAIN = 0.2
"""Seconds to wait for the end of a response after the end of its stream."""

LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")

SHOWN = 200
"""Maximum number of characters of a body in an error."""


class Client:
    """Connections to a server, for one event loop.

    Args:
        server: The server.
        timeout: Seconds to wait for a response, or for the next piece of a stream.
    """

    def __init__(self, server: Server, *, timeout: float) -> None:
        self._server, self._timeout = server, timeout
        headers = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
        if server.authorization is not None:
            headers["Authorization"] = server.authorization
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=timeout,
            # Concurrency is limited elsewhere, where waiting does not count towards the timeout.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            follow_redirects=True,
            trust_env=server.proxied,
            verify=certificates(),
        )

    async def bodies(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """Sends a request, and yields the parsed body of the response, or each body of its stream; then ``DONE``.

        A stream that ends early yields no ``DONE``.

        Raises:
            Rejected: If the server responds with an error, with any status.
            Malformed: If a body is not JSON.
            httpx.HTTPError: If the connection fails.
            TimeoutError: If the next piece of a stream does not arrive in time.
        """
        # ASCII only: UTF-8 cannot encode a lone surrogate in a prompt.
        content = json.dumps(body, allow_nan=False).encode()
        async with self._http.stream("POST", self._server.url + path, content=content) as response:
            if response.status_code >= 300:
                raise await self._rejected(response)
            async with closing(self._timely(response.aiter_bytes())) as pieces:
                head = b""
                async for piece in pieces:
                    head += piece
                    if len(head.lstrip()) >= HEAD_BYTES:
                        break
                async with closing(_bodies(head, pieces)) as bodies:
                    async for data in bodies:
                        yield data if data is DONE else self._parse(data, response)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _timely(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same pieces, each within the timeout."""
        async with closing(pieces):
            while True:
                async with asyncio.timeout(self._timeout):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                yield piece

    async def _rejected(self, response: httpx.Response) -> Rejected:
        text = (await response.aread()).decode("utf-8", "replace")
        try:
            body = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            body = text
        error = self._error(body, response)
        assert error is not None
        return error

    def _parse(self, data: bytes, response: httpx.Response) -> Any:
        text = data.decode("utf-8-sig", "replace")
        try:
            body = json.loads(text, strict=False)
        # A number with thousands of digits raises a plain ValueError.
        except (ValueError, RecursionError):
            shown = self._server.redact(text)[:SHOWN]
            raise Malformed(f"the body is not JSON: {shown}" if shown else "the body is empty") from None
        if error := self._error(_error_of(body), response):
            raise error
        return body

    def _error(self, body: Any, response: httpx.Response) -> Rejected | None:
        return rejection(
            body,
            status=response.status_code,
            headers=response.headers,
            redact=self._server.redact,
            reason=response.reason_phrase,
        )


async def _bodies(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """The data of each event of a stream, or the whole body of another response.

    The first bytes decide which it is, because some servers ignore ``stream`` or send the wrong content type.
    """
    if not EVENT.match(head.removeprefix(BOM).lstrip()):
        yield b"".join([head, *[piece async for piece in rest]])
        yield DONE
        return
    async with closing(_events(head, rest)) as events:
        async for data in events:
            if data.strip() == b"[DONE]":
                yield DONE
                # A connection can be reused only if its response was read to the end, which some servers never send.
                with suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN):
                        async for _ in rest:
                            pass
                return
            yield data


async def _events(head: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    reader = EventReader()
    for data in reader.feed(head):
        yield data
    async for piece in rest:
        for data in reader.feed(piece):
            yield data
    for data in reader.finish():
        yield data


def _error_of(body: Any) -> Any:
    """The error in a body; without an error, the body itself. Some routers put the error into the choice."""
    choices = body.get("choices") if isinstance(body, Mapping) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    inner = first.get("error") if isinstance(first, Mapping) else None
    return {"error": inner} if inner else body


class EventReader:
    r"""Splits the bytes of a stream into the data of server-sent events. Comments and other fields are left out.

    Example:
        >>> reader = EventReader()
        >>> list(reader.feed(b"data: on")), list(reader.feed(b"e\n\n: comment\n\ndata: two")), list(reader.finish())
        ([], [b'one'], [b'two'])
    """

    def __init__(self) -> None:
        self._line, self._data = b"", list[bytes]()

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Takes the next bytes, and yields the data of the events that they complete."""
        *lines, self._line = LINE_END.split(self._line + piece)
        for line in lines:
            yield from self._take(line)

    def finish(self) -> Iterator[bytes]:
        """Yields the data of the last event if no empty line follows it."""
        yield from self._take(self._line.rstrip(b"\r"))
        yield from self._take(b"")

    def _take(self, line: bytes) -> Iterator[bytes]:
        if not line:
            if self._data:
                yield b"\n".join(self._data)
            self._data = []
            return
        field, _, value = line.removeprefix(BOM).partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))


def certificates() -> ssl.SSLContext:
    """The certificates to trust: those of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR``, or those of certifi.

    Raises:
        ConfigError: If they cannot be read.
    """
    return _certificates(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@cache
def _certificates(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Cached, because loading certificates takes longer than the rest of creating a client."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
        raise ConfigError(
            f"the certificates in {file or folder} cannot be read ({error.strerror or error})",
            fix=f"set {name} to a PEM file or folder, or unset it",
        ) from error
