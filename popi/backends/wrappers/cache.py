"""Keeps responses and scores on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from popi.backends.base import Backend, ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult, ignore_result
from popi.backends.together import closing
from popi.backends.wrappers.base import Request, Result, Wrapper
from popi.engine.forking import ForkLock
from popi.errors import BackendError, InputError

log = logging.getLogger(__name__)

TABLE = "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, result TEXT NOT NULL)"


class Cache(Wrapper):
    """Stores responses and scores in a file, and does not send requests whose results are stored.

    A result is stored if the request determines it: greedy decoding, or sampling with a seed. Failures are not stored.
    Entries are found by the request and by :attr:`Backend.identity`, so that results of another server, or of other
    weights, are never returned under the same name. Several threads and processes may share a file.

    If the file cannot be written, for example because the disk is full, results are returned but not stored.

    Example:
        >>> import asyncio, tempfile
        >>> from popi.prompts import Message
        >>> from popi.testing import ScriptedBackend
        >>> requests = [ChatRequest([Message("user", "Hello")])]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = Cache(ScriptedBackend({"Hello": "Hi."}), file=Path(folder, "results.sqlite"))
        ...     first, second = asyncio.run(cache.chat(requests)), asyncio.run(cache.chat(requests))
        ...     asyncio.run(cache.close())
        >>> first == second, cache.hits, cache.misses
        (True, 1, 1)

    Args:
        inner: The backend.
        file: An SQLite file. It is created if it does not exist.

    Attributes:
        hits: Number of requests whose results were stored.
        misses: Number of requests that were passed on.

    Raises:
        InputError: If the file is not a cache, or cannot be created.
    """

    def __init__(self, inner: Backend, file: Path) -> None:
        super().__init__(inner)
        self.hits = self.misses = 0
        self._file, self._writes, self._closed = file, True, False
        self._open_connection: sqlite3.Connection | None = None
        # SQLite has its own locks, and a child must not inherit an open file. It is closed before a fork.
        self._lock = ForkLock(before_fork=self._disconnect)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._execute(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cannot be used as a cache: {error}", file=file, fix="name another file") from error

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the file cannot be read, or the backend as a whole is not available.
        """
        return await self._each(requests, self.inner.chat, ChatResult)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Scores each response, including its end of turn, given its conversation.

        Raises:
            BackendError: If the file cannot be read, or the backend as a whole is not available.
        """
        return await self._each(requests, self.inner.score, ScoreResult)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation, and yields the text in pieces; a response from the file in one piece.

        Raises:
            BackendError: If the request fails or the stream breaks.
        """
        [key] = self._keys([request])
        known = None if key is None else self._read(key, ChatResult)
        self._count(hits=int(known is not None), misses=int(known is None))
        if known is not None:
            yield known.text
            on_complete(known)
            return

        def complete(result: ChatResult) -> None:
            self._write(key, result)
            on_complete(result)

        async with closing(self.inner.stream(request, complete)) as pieces:
            async for piece in pieces:
                yield piece

    async def close(self) -> None:
        """Closes the file and the backend."""
        with self._lock:
            self._closed = True
            self._disconnect()
        await self.inner.close()

    async def _each(
        self,
        requests: Sequence[Request],
        ask: Callable[[Sequence[Request]], Awaitable[list[Result]]],
        kind: type[Result],
    ) -> list[Result]:
        keys = self._keys(requests)
        known = {
            key: result
            for key in dict.fromkeys(keys)
            if key is not None and (result := self._read(key, kind)) is not None
        }
        # Of equal requests the first one is passed on for all of them.
        first = {key: place for place, key in reversed(list(enumerate(keys))) if key is not None}
        missing = [place for place, key in enumerate(keys) if key is None or (key not in known and first[key] == place)]
        self._count(hits=len(requests) - len(missing), misses=len(missing))
        answers = dict(zip(missing, await ask([requests[place] for place in missing]) if missing else [], strict=True))
        for place, result in answers.items():
            self._write(keys[place], result)
        return [
            known[key] if key is not None and key in known else answers[place if key is None else first[key]]
            for place, key in enumerate(keys)
        ]

    def _count(self, *, hits: int, misses: int) -> None:
        with self._lock:
            self.hits, self.misses = self.hits + hits, self.misses + misses

    def _keys(self, requests: Sequence[ChatRequest | ScoreRequest]) -> list[str | None]:
        """The keys of requests; ``None`` for those that do not determine their results."""
        identity = self.identity  # of a live model it is a hash of all weights
        return [_key(request, identity) for request in requests]

    def _execute(self, statement: str, values: Sequence[str] = ()) -> tuple[str] | None:
        """Executes a statement, and returns the first row of its result."""
        with self._lock:
            row: tuple[str] | None = self._connection().execute(statement, values).fetchone()
        return row

    def _connection(self) -> sqlite3.Connection:
        if self._open_connection is None:
            # Each statement is its own transaction: a result is kept whatever happens next.
            self._open_connection = sqlite3.connect(
                self._file, isolation_level=None, timeout=30, check_same_thread=False
            )
            self._open_connection.execute("PRAGMA journal_mode=WAL")
        return self._open_connection

    def _disconnect(self) -> None:
        connection, self._open_connection = self._open_connection, None
        if connection is not None:
            connection.close()

    def _read(self, key: str, kind: type[Result]) -> Result | None:
        if self._closed:
            raise BackendError(f"{self.model}: the cache is closed")
        try:
            row = self._execute("SELECT result FROM results WHERE key = ?", (key,))
        except sqlite3.Error as error:
            raise BackendError(f"{self.model}: the cache {self._file} cannot be read: {error}") from error
        try:
            return kind(**json.loads(row[0])) if row else None
        # An entry that another program has changed.
        except (ValueError, TypeError):
            return None

    def _write(self, key: str | None, result: ChatResult | ScoreResult) -> None:
        if key is None or result.error is not None:
            return
        if isinstance(result, ScoreResult) and not math.isfinite(result.logprob):
            return
        try:
            text = json.dumps(asdict(result))
            self._execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, text))
            self._writes = True
        except sqlite3.Error as error:
            if self._writes:
                log.warning("%s: results are no longer stored: %s", self._file, error)
            self._writes = False


def _key(request: ChatRequest | ScoreRequest, identity: str) -> str | None:
    if isinstance(request, ChatRequest) and request.temperature > 0 and request.seed is None:
        return None
    # The user whose account is charged does not change the result.
    parts = [type(request).__name__, identity, asdict(replace(request, user=""))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
