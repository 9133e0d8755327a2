"""HTTP: sends a request through the openai SDK, and reads the JSON or the server-sent events of its response.

Responses are read here: the streams of the SDK do not show whether a response ended early, and do not accept JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from functools import cache
from typing import Any, Final

import httpx2
from openai import APIStatusError, AsyncOpenAI, DefaultAsyncHttpx2Client, omit

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

KEEPALIVE_EXPIRY = 3.0
"""Seconds to keep an idle connection. Servers close it after 5 by default; a request at that moment would be lost."""

SHOWN = 200
"""Maximum number of characters of a body in an error."""


class Client:
    """Connections to a server, for one event loop.

    Args:
        server: The server.
        timeout: Seconds to wait for a response, or for the next piece of a stream.
    """

    def __init__(self, server: Server, *, timeout: float) -> None:
        self._server = server
        self._openai = AsyncOpenAI(
            api_key="none",  # The header of each request replaces it.
            base_url=server.url,
            timeout=timeout,
            max_retries=0,
            http_client=DefaultAsyncHttpx2Client(
                # The number of requests at once is limited elsewhere, where waiting does not count as a timeout.
                limits=httpx2.Limits(keepalive_expiry=KEEPALIVE_EXPIRY),
                trust_env=server.proxied,
                verify=certificates(),
            ),
        )

    async def bodies(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """Sends a request, and yields the parsed body of the response, or each body of its stream; then ``DONE``.

        A stream that ends early yields no ``DONE``.

        Raises:
            Rejected: If the server responds with an error, with any status.
            Malformed: If a body is not JSON.
            openai.APIConnectionError: If the request fails before the response.
            httpx2.HTTPError: If the response breaks off.
        """
        try:
            response = await self._openai.post(
                path,
                cast_to=httpx2.Response,
                # ASCII only: UTF-8 cannot encode a lone surrogate in a prompt.
                content=json.dumps(body, allow_nan=False).encode(),
                options={"headers": {"Authorization": self._server.authorization or omit}},
                stream=True,
            )
        except APIStatusError as error:
            raise self._error(error.body, error.response) or error from None
        assert isinstance(response, httpx2.Response)
        async with aclosing(response), closing(_bodies(response)) as bodies:
            async for data in bodies:
                yield data if data is DONE else self._parse(data, response)

    async def close(self) -> None:
        """Closes the connections."""
        await self._openai.close()

    def _parse(self, data: str, response: httpx2.Response) -> Any:
        try:
            body = json.loads(data, strict=False)
        # A ValueError that is no JSONDecodeError comes from a number with thousands of digits.
        except (ValueError, RecursionError):
            shown = self._server.redact(data).strip()[:SHOWN]
            raise Malformed(f"the body is not JSON: {shown}" if shown else "the body is empty") from None
        if error := self._error(_error_of(body), response):
            raise error
        return body

    def _error(self, body: Any, response: httpx2.Response) -> Rejected | None:
        return rejection(
            body,
            status=response.status_code,
            headers=response.headers,
            redact=self._server.redact,
            reason=response.reason_phrase,
        )


async def _bodies(response: httpx2.Response) -> AsyncIterator[Any]:
    """The data of each event of a stream, or the whole body of another response; then ``DONE``.

    The first bytes decide which it is, because some servers ignore ``stream`` or send the wrong content type.
    """
    pieces, head = response.aiter_bytes(), b""
    async for piece in pieces:
        head = (head + piece).removeprefix(BOM).lstrip()
        if len(head) >= HEAD_BYTES:
            break
    if not EVENT.match(head):
        yield b"".join([head, *[piece async for piece in pieces]]).decode("utf-8", "replace")
        yield DONE
        return
    async with closing(aiter(_events(head, pieces, response))) as events:
        async for event in events:
            if event.data.strip() == "[DONE]":
                yield DONE
                # A connection can be reused only if its response was read to the end, which some servers never send.
                with suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN):
                        async for _ in pieces:
                            pass
                return
            if event.data:
                yield event.data


def _events(head: bytes, rest: AsyncIterator[bytes], response: httpx2.Response) -> httpx2.EventSource:
    async def content() -> AsyncIterator[bytes]:
        yield head
        async for piece in rest:
            yield piece
        yield b"\n\n"  # ends an event that no empty line ends

    labelled = httpx2.Response(
        200, headers={"Content-Type": "text/event-stream"}, content=content(), request=response.request
    )
    return httpx2.EventSource(labelled, max_event_size=None)


def _error_of(body: Any) -> Any:
    """The error in a body; without an error, the body itself. Some routers put the error into the choice."""
    choices = body.get("choices") if isinstance(body, Mapping) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    inner = first.get("error") if isinstance(first, Mapping) else None
    return {"error": inner} if inner else body


def certificates() -> ssl.SSLContext:
    """The certificates to trust: those of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR``, or those of the system.

    Raises:
        ConfigError: If they cannot be read.
    """
    return _certificates(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@cache
def _certificates(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Cached, because loading certificates takes longer than the rest of creating a client."""
    try:
        return httpx2.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
        raise ConfigError(
            f"the certificates in {file or folder} cannot be read ({error.strerror or error})",
            fix=f"set {name} to a PEM file or folder, or unset it",
        ) from error
