"""Remembers answers on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from popi.backends.base import Backend, ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult, ignore_result
from popi.backends.together import held
from popi.backends.wrappers.base import Request, Result, Wrapper
from popi.errors import BackendError, InputError

log = logging.getLogger(__name__)


class Cache(Wrapper):
    """Remembers answers and scores in a file, and asks for nothing twice that would come out the same.

    An answer is a function of its request where it is greedy or has a seed; others are passed on. What failed is never
    kept. The name of the model is part of what an entry is found by: a model that changes under its name needs a new
    file. Several processes may share one.

    Args:
        inner: The backend that is asked for what is not there.
        file: An SQLite file, made when absent.

    Attributes:
        hits: How many requests were answered from the file.
        misses: How many were passed on.

    A file that can be written no more, because the disk is full, costs no answer: they are given and not kept.

    Raises:
        InputError: If the file is something else, or cannot be made.
    """

    def __init__(self, inner: Backend, file: Path) -> None:
        super().__init__(inner)
        self.hits = self.misses = 0
        self._file, self._keeps = file, True
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Each statement is its own transaction: what was answered is kept whatever comes next.
            self._kept = sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False)
            self._kept.execute("PRAGMA journal_mode=WAL")
            self._kept.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, result TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cannot be used as a cache: {error}", file=file, fix="name another file") from error

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Continues each conversation.

        Raises:
            BackendError: If the file cannot be read, or the backend as a whole cannot serve what is not there.
        """
        return await self._each(requests, self.inner.chat, ChatResult)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Sums the log-probabilities of each response, end of turn included, given its conversation.

        Raises:
            BackendError: If the backend as a whole cannot serve what is not there.
        """
        return await self._each(requests, self.inner.score, ScoreResult)

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        """Continues one conversation; an answer that is there comes in one piece.

        Raises:
            BackendError: If the answer cannot be had or breaks off.
        """
        key = self._key(request)
        if key is not None and (known := self._known(key)):
            self.hits += 1
            if known["text"]:
                yield known["text"]
            on_complete(ChatResult(**known))
            return
        self.misses += 1

        def answered(result: ChatResult) -> None:
            self._keep(key, result)
            on_complete(result)

        async with held(self.inner.stream(request, answered)) as pieces:
            async for piece in pieces:
                yield piece

    async def close(self) -> None:
        """Closes the file and the backend."""
        self._kept.close()
        await self.inner.close()

    async def _each(
        self,
        requests: Sequence[Request],
        ask: Callable[[Sequence[Request]], Awaitable[list[Result]]],
        kind: Callable[..., Result],
    ) -> list[Result]:
        keys = [self._key(request) for request in requests]
        found = {key: kind(**known) for key in dict.fromkeys(keys) if key is not None and (known := self._known(key))}
        # Of equal requests the first one is passed on for all of them.
        first = {key: place for place, key in reversed(list(enumerate(keys))) if key is not None}
        asked = [place for place, key in enumerate(keys) if key is None or (key not in found and first[key] == place)]
        self.hits, self.misses = self.hits + len(requests) - len(asked), self.misses + len(asked)
        answers = dict(zip(asked, await ask([requests[place] for place in asked]) if asked else [], strict=True))
        for place, result in answers.items():
            self._keep(keys[place], result)
        return [
            found[key] if key is not None and key in found else answers[place if key is None else first[key]]
            for place, key in enumerate(keys)
        ]

    def _key(self, request: ChatRequest | ScoreRequest) -> str | None:
        if isinstance(request, ChatRequest) and request.temperature > 0 and request.seed is None:
            return None
        # Whom an answer is for does not change it.
        asked = [type(request).__name__, self.model, asdict(replace(request, user=""))]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _known(self, key: str) -> dict[str, Any] | None:
        try:
            row = self._kept.execute("SELECT result FROM results WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise BackendError(f"{self.model}: the cache {self._file} cannot be read: {error}") from error
        known: dict[str, Any] | None = json.loads(row[0]) if row else None
        return known

    def _keep(self, key: str | None, result: ChatResult | ScoreResult) -> None:
        if key is None or result.error is not None:
            return
        try:
            self._kept.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, json.dumps(asdict(result))))
            self._keeps = True
        except sqlite3.Error as error:
            if self._keeps:
                log.warning("%s keeps no more answers: %s", self._file, error)
            self._keeps = False
