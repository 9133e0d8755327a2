"""A worker of Ray that writes shards, and the actor to which all workers report."""

from __future__ import annotations

import asyncio
import io
import logging
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import cached_property
from typing import Any, TextIO

from popi.cli.output import note, telling_log
from popi.cli.shards import Shard, write_shard
from popi.cli.summaries import SummaryWriter
from popi.errors import LockedError, PopiError

ATTEMPTS = 5
"""Maximum number of workers that may die in one shard. Ray itself would start another one forever."""

PATIENCE = 120.0
"""Seconds to wait for the lock of a shard: a file server frees the locks of a machine that died only after a while."""

SECONDS_BETWEEN_COUNTS = 1.0

MARK = "popi: "


class Tally:
    """What the workers report."""

    def __init__(self) -> None:
        self._attempts: Counter[int] = Counter()
        self._users, self._notes = 0, list[str]()

    def begin(self, place: int) -> int:
        """Returns how many workers have begun a shard, with this one."""
        self._attempts[place] += 1
        return self._attempts[place]

    def add(self, users: int, notes: Sequence[str]) -> None:
        """Adds users who are finished, and notes."""
        self._users += users
        self._notes.extend(notes)

    def take(self) -> tuple[int, list[str]]:
        """Returns what was added since the last call."""
        taken = self._users, self._notes
        self._users, self._notes = 0, []
        return taken


class Reporter(io.TextIOBase):
    """Shows progress by sending it to the tally. In the place of standard error, it sends the notes of popi, too.

    Args:
        tally: The handle of the tally.
        other: Receives the lines of other programs.
    """

    def __init__(self, tally: Any, other: TextIO) -> None:
        self._tally, self._other = tally, other
        self._users, self._sent = 0, time.monotonic()

    def write(self, text: str) -> int:
        """Sends a note of popi."""
        if text.startswith(MARK):
            self.note(text.removeprefix(MARK))
        else:
            self._other.write(text)
        return len(text)

    def note(self, text: str) -> None:
        """Sends a line."""
        self._tally.add.remote(0, [text])

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Counts users as finished."""
        self._users += count
        if time.monotonic() - self._sent >= SECONDS_BETWEEN_COUNTS:
            self.send()

    def send(self) -> Any:
        """Sends the count."""
        sent = self._tally.add.remote(self._users, [])
        self._users, self._sent = 0, time.monotonic()
        return sent


class Worker:
    """Loads the model once, and writes one shard after the other.

    Args:
        tally: The handle of the tally.
        shards: All shards.
        load: Loads the model.
        settings: The settings that the summaries depend on.
        skip_bad_rows: Whether to continue without bad rows.
    """

    def __init__(
        self,
        tally: Any,
        shards: Sequence[Shard],
        load: Callable[[], SummaryWriter],
        settings: Mapping[str, Any],
        skip_bad_rows: bool,
    ) -> None:
        self._tally, self._shards = tally, shards
        self._load, self._settings, self._skip_bad_rows = load, settings, skip_bad_rows
        # The connections of a client belong to an event loop.
        self._loop = asyncio.Runner()

    @cached_property
    def _writer(self) -> SummaryWriter:
        # In the constructor, an error would be one of Ray, and Ray would start the worker again.
        return self._load()

    def __call__(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """Writes the shard at a place. Returns its report, or the error that ended it."""
        import ray

        place, reporter = int(row["place"]), Reporter(self._tally, sys.stderr)
        outcome: Mapping[str, Any] | PopiError
        try:
            with redirect_stderr(reporter), telling_log(logging.WARNING):
                shard, attempt = self._shards[place], ray.get(self._tally.begin.remote(place))
                if attempt > ATTEMPTS:
                    raise PopiError(f"{ATTEMPTS} workers died in {shard.signals}; see the logs of Ray")
                if attempt > 1:
                    note(f"a worker died in {shard.signals.name}; another one continues it")
                outcome = self._loop.run(self._write(shard, reporter))
        except PopiError as error:
            outcome = error
        # Calls of one process arrive in order, so the notes are there before the outcome.
        ray.get(reporter.send())
        return {"outcome": pickle.dumps(outcome)}

    async def _write(self, shard: Shard, reporter: Reporter) -> dict[str, Any]:
        settings, patient_until = self._settings, time.monotonic() + PATIENCE
        label = shard.signals.name
        while True:
            try:
                return await write_shard(
                    shard, self._writer, settings, skip_bad_rows=self._skip_bad_rows, label=label, shown=reporter
                )
            except LockedError:
                if time.monotonic() >= patient_until:
                    raise
            await asyncio.sleep(1)
