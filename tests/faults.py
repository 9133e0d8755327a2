"""Servers that misbehave: one in front of a real server that plants faults, and one whose responses a test scripts."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, get_args

import httpx2

Fault = Literal["429 until", "429", "500", "503 burst", "refused", "reset", "half a body", "stall", "html"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

STATUS: dict[Fault | None, int] = {"429 until": 429, "429": 429, "500": 500, "503 burst": 503}
"""The faults that are no more than a status."""

SAID = json.dumps({"error": {"message": "not now, please"}}).encode()

Event = dict[str, Any]


class FaultyServer:
    """Passes requests on to a server behind it, and deals each of them a fault, or none, by a seeded generator.

    Answers of the server behind are read to their end before they are passed on, event by event if they are streams.

    Args:
        behind: The base URL of the server behind.
        shares: The share of the requests that is dealt each fault.
        seed: Seeds the deal: the same order of requests meets the same faults.
        stall: Seconds for which an answer stops halfway.
        later: After how many seconds a 429 wants to be asked again, where it says so.
        burst: How many requests in a row get a 503.

    Attributes:
        url: The base URL of this server.
        planted: How many of each fault were planted.
        passed: How many requests were dealt none.
    """

    def __init__(
        self,
        behind: str,
        shares: Mapping[Fault, float],
        *,
        seed: int = 0,
        stall: float = 30.0,
        later: float = 1.0,
        burst: int = 4,
    ) -> None:
        self._behind, self._stall, self._later, self._burst = behind.removesuffix("/v1"), stall, later, burst
        self._faults: list[Fault | None] = [*shares, None]
        self._weights = [*shares.values(), 1 - sum(shares.values())]
        self._random, self._left = random.Random(seed), 0
        self.planted: Counter[Fault] = Counter()
        self.passed = 0
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[FaultyServer]:
        """Serves on loopback, in a thread of its own."""
        import uvicorn

        config = uvicorn.Config(self, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening, socket.socket() as dead:
            # Else the end of every answer waits for the client to acknowledge its beginning.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A port that is taken, and where nobody listens.
            dead.bind(("127.0.0.1", 0))
            self.url, self._dead = f"http://{_address(listening)}/v1", f"http://{_address(dead)}"
            thread = threading.Thread(target=lambda: asyncio.run(self._serve(listening)))
            thread.start()
            try:
                yield self
            finally:
                self._server.should_exit = True
                thread.join()

    async def _serve(self, listening: socket.socket) -> None:
        async with httpx2.AsyncClient(timeout=None) as self._client:
            await self._server.serve([listening])

    async def __call__(
        self, scope: Event, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]
    ) -> None:
        """The ASGI application."""
        reply = _Reply(receive, send)
        body = await reply.asked()
        fault = self._deal()
        if fault is None:
            self.passed += 1
        else:
            self.planted[fault] += 1
        match fault:
            case "429 until" | "429" | "500" | "503 burst":
                later = {"retry-after": f"{self._later:g}"} if fault == "429 until" else {}
                await reply.whole(STATUS[fault], SAID, "application/json", **later)
            case "refused":
                await reply.whole(307, b"", "text/plain", location=self._dead + scope["path"])
            case "html":
                await reply.whole(200, b"<!DOCTYPE html><html><body>Please log in.</body></html>", "text/html")
            case _:
                await self._pass_on(scope, body, reply, fault)

    async def _pass_on(self, scope: Event, body: bytes, reply: _Reply, fault: Fault | None) -> None:
        kept = (b"authorization", b"content-type")
        answer = await self._client.request(
            scope["method"],
            self._behind + scope["path"],
            content=body,
            headers=[(name, value) for name, value in scope["headers"] if name in kept],
        )
        kind = answer.headers["content-type"]
        parts = [event + b"\n\n" for event in answer.content.split(b"\n\n") if event]
        if not kind.startswith("text/event-stream"):
            parts = [answer.content]
        whole = b"".join(parts)
        await reply.begin(answer.status_code, kind)
        if fault in ("reset", "half a body", "stall"):
            await reply.more(whole[: len(whole) // 2])
        else:
            for part in parts:
                await reply.more(part)
        if fault == "reset":
            await self._reset(scope["client"])
        if fault in ("reset", "stall"):
            await reply.gone(self._stall)
        await reply.end()

    async def _reset(self, client: tuple[str, int]) -> None:
        """Breaks a connection off, after what was sent has arrived."""
        await asyncio.sleep(0.05)
        for connection in [each for each in self._server.server_state.connections if each.client == client]:
            # A socket that lingers for no time at all says RST in place of FIN.
            linger = struct.pack("ii", 1, 0)
            connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.transport.abort()

    def _deal(self) -> Fault | None:
        """The fault of the next request."""
        if self._left:
            self._left -= 1
            return "503 burst"
        [fault] = self._random.choices(self._faults, self._weights)
        if fault == "503 burst":
            self._left = self._burst - 1
        return fault


class _Reply:
    """An answer in the making."""

    def __init__(self, receive: Callable[[], Awaitable[Event]], send: Callable[[Event], Awaitable[None]]) -> None:
        self._receive, self._send = receive, send

    async def asked(self) -> bytes:
        """The body of the request."""
        body, more = b"", True
        while more:
            message = await self._receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        return body

    async def whole(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        """All of an answer."""
        await self.begin(status, kind, content_length=str(len(body)), **headers)
        await self.more(body)
        await self.end()

    async def begin(self, status: int, kind: str, **headers: str) -> None:
        """The head of an answer."""
        told = {"content-type": kind, **headers}
        lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in told.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def more(self, body: bytes) -> None:
        """A part of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        """The end of the body."""
        await self._send({"type": "http.response.body", "body": b""})

    async def gone(self, seconds: float) -> None:
        """Waits until the client has gone, or so long."""
        try:
            async with asyncio.timeout(seconds):
                while (await self._receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            return


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()
    return f"{host}:{port}"


def piece(text: str | list[Any] | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    """A piece of a response: its text, why it ended, its ``usage``, other ``choices``, and fields of its turn."""
    return {"text": text, "reason": reason, **more}


def whole(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that is not streamed."""
    joined: dict[str, Any] = {"text": None, "reason": None}
    for each in pieces:
        text = each["text"]
        joined |= {name: value for name, value in each.items() if name != "text" and value is not None}
        joined["text"] = joined["text"] + text if joined["text"] and text else joined["text"] or text
    return {name: value for name, value in joined.items() if name != "choices"}


def rendered(each: dict[str, Any], turn: str) -> dict[str, Any]:
    """A piece in the form of an endpoint: ``message``, ``delta`` or ``text``."""
    more = {name: value for name, value in each.items() if name not in ("text", "reason", "usage", "choices")}
    inner = each["text"] if turn == "text" else {"role": "assistant", "content": each["text"], **more}
    choices = each.get("choices", [{"index": 0, "finish_reason": each["reason"], turn: inner}])
    made = {"id": "1", "created": 0, "model": "m", "choices": choices}
    return {**made, "usage": each["usage"]} if "usage" in each else made


def written(value: Any) -> str:
    """JSON in which only halves of characters are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(rf"\u{ord(char):04x}" if "\ud800" <= char <= "\udfff" else char for char in text)


@dataclass
class Scripted:
    """What a server responds.

    Attributes:
        body: Pieces of a response, which are rendered for the endpoint; else JSON, or bytes as they are.
        status: The HTTP status.
        headers: Further headers.
        done: Whether a stream ends with ``[DONE]``.
        streams: Whether it is a stream; ``None`` is what the request asks for.
        delay: Seconds until it responds.
    """

    body: list[dict[str, Any]] | dict[str, Any] | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    done: bool = True
    streams: bool | None = None
    delay: float = 0.0


class ScriptedServer:
    """A server that responds to each request by a function of its body.

    Attributes:
        url: The base URL.
        script: The function.
        bodies: The bodies of all requests.
        headers: Their headers.
    """

    def __init__(self, script: Callable[[dict[str, Any]], Scripted]) -> None:
        self.script, self.url = script, ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Message] = []

    @contextmanager
    def running(self) -> Iterator[ScriptedServer]:
        """Serves on loopback, each request in its own thread."""
        handler = type("Handler", (_Handler,), {"scripted": self})
        with _Threads(("127.0.0.1", 0), handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


Serve = Callable[..., ScriptedServer]
"""Starts a server that responds in one way, or by a function of the request."""


class _Threads(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, *request: Any) -> None:
        """Stays silent about clients that leave."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scripted: ScriptedServer

    def log_message(self, *words: Any) -> None:
        """Stays silent."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.scripted.bodies.append(body)
        self.scripted.headers.append(self.headers)
        reply = self.scripted.script(body)
        time.sleep(reply.delay)
        streams = body.get("stream", False) if reply.streams is None else reply.streams
        streams = streams and isinstance(reply.body, list)
        self.send_response(reply.status)
        kind = "text/event-stream" if streams else "application/json"
        data = self._stream(reply) if streams else self._whole(reply)
        # A stream ends with its connection, so that one that breaks off looks like one that is complete.
        length = {} if streams else {"Content-Length": str(len(data))}
        for name, value in {"Content-Type": kind, "Connection": "close", **length, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def _whole(self, reply: Scripted) -> bytes:
        if isinstance(reply.body, bytes):
            return reply.body
        turn = "message" if self.path.endswith("/chat/completions") else "text"
        return written(rendered(whole(reply.body), turn) if isinstance(reply.body, list) else reply.body).encode()

    def _stream(self, reply: Scripted) -> bytes:
        assert isinstance(reply.body, list)
        turn = "delta" if self.path.endswith("/chat/completions") else "text"
        events = [each.get("raw") or written(rendered(each, turn)) for each in reply.body]
        done = ["[DONE]"] if reply.done else []
        return "".join(f"data: {event}\n\n" for event in [*events, *done]).encode()
