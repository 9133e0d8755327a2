"""The folder of an evaluation. It keeps the measurements piece by piece, so that an interrupted run can be resumed.

::

    config.json                          settings, models, versions, time
    users/<sample>/summaries/*.jsonl     the summaries of a writer, one user per line
    users/<sample>/<column>/<row>.jsonl  the measurements of a generator under a row, one user per line
    results.json, results.md, *.png      the figures

A piece is written as a whole and never changed, so all pieces of a folder have the same settings. A later run can add
rows, columns and samples.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from popi.errors import InputError
from popi.io import read_jsonl, validate, write_jsonl, write_text
from popi.provenance import check_unchanged

PIECES = "users"

Record = TypeVar("Record", bound=BaseModel)


class RunConfig(BaseModel):
    """How the pieces of a folder were made.

    Attributes:
        settings: Settings that every piece depends on.
        models: The fingerprint of each model's files; ``None`` if they are not on this machine.
        rows: The rows of the last run.
        columns: The generators of the last run.
        seeds: The seeds of the last run, one for each sample of users.
        versions: Versions of popi, Python and libraries.
        started: Start of the first run, in UTC.
        seconds: Total duration of all runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    models: dict[str, str | None]
    rows: list[str]
    columns: list[str]
    seeds: list[int]
    versions: dict[str, str]
    started: str
    seconds: float = 0.0


class Folder:
    """A folder of pieces.

    Args:
        path: The folder. It is created with the first file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, config: RunConfig) -> RunConfig:
        """Starts a run: writes the configuration, after comparing it with that of earlier runs.

        Returns:
            The configuration, with the models and the duration of earlier runs.

        Raises:
            InputError: If the folder was made with other settings, or with another model of the same name.
        """
        path = self.path / "config.json"
        if path.exists():
            before = _read_config(path)
            # Without any piece the earlier settings have no effect.
            if (self.path / PIECES).exists():
                _check_unchanged(before, config, self.path)
            models = {**before.models, **config.models}
            earlier = {"models": models, "started": before.started, "seconds": before.seconds}
            config = config.model_copy(update=earlier)
        self.write("config.json", config.model_dump_json(indent=2) + "\n")
        return config

    def close(self, config: RunConfig, seconds: float) -> None:
        """Ends a run: adds its duration to the configuration.

        Raises:
            PopiError: If it cannot be written.
        """
        spent = config.model_copy(update={"seconds": round(config.seconds + seconds, 1)})
        self.write("config.json", spent.model_dump_json(indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder atomically.

        Raises:
            PopiError: If it cannot be written.
        """
        write_text(self.path / name, text)

    async def piece(
        self, *names: str, model: type[Record], make: Callable[[], Awaitable[list[Record]]]
    ) -> list[Record]:
        """Reads a piece, or makes and writes it.

        Args:
            names: Its path below ``users/``, without the ending.
            model: The type of its lines.
            make: Makes it.

        Raises:
            InputError: If the piece exists and cannot be read.
            PopiError: If it cannot be written.
        """
        *folders, last = map(_file_name, names)
        path = self.path.joinpath(PIECES, *folders, f"{last}.jsonl")
        if path.exists():
            return [record for _, record in read_jsonl(path, model)]
        made = await make()
        write_jsonl(path, made)
        return made


def _read_config(path: Path) -> RunConfig:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError("is not the configuration of an evaluation", file=path) from error
    return validate(RunConfig, found, file=path)


def _check_unchanged(before: RunConfig, now: RunConfig, folder: Path) -> None:
    fix = "name another folder with --out, or remove this one to measure again"
    check_unchanged(before.settings, now.settings, file=folder, fix=fix)
    # A model that was downloaded during an earlier run had no fingerprint then.
    both = {name: files for name, files in before.models.items() if files is not None and name in now.models}
    check_unchanged({"models": both}, {"models": {name: now.models[name] for name in both}}, file=folder, fix=fix)


def _file_name(name: str) -> str:
    """A name as a file name. If it must be changed, a hash of the name keeps it unique."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
