"""The folder of an evaluation: what was measured, kept piece by piece, so that an interrupted run goes on.

::

    config.json                          settings, models, versions, time
    users/<sample>/summaries/*.jsonl     what a writer wrote, a line a user
    users/<sample>/<column>/<row>.jsonl  what a generator did under a row's summaries, a line a user
    results.json, results.md, *.png      the figures

A piece is whole or absent and is never written again, so a folder holds pieces of the same settings only. Rows,
columns and samples may be added by a later run.
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
    """What made the pieces of a folder.

    Attributes:
        settings: What every piece depends on.
        models: The fingerprint of each model's files, ``None`` where there are none at hand.
        rows: Of the last run, as the columns and the seeds.
        columns: The generators.
        seeds: One for each sample of users.
        versions: Of what was used.
        started: When the first run began, in UTC.
        seconds: The time that all runs took together.
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
    """A folder of pieces, made when it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, config: RunConfig) -> RunConfig:
        """Makes this the folder of these settings, or finds that it is.

        Returns:
            The configuration as it now stands in the folder, with the models and the time of earlier runs.

        Raises:
            InputError: If the folder was made with other settings, or with another model of the same name.
        """
        path = self.path / "config.json"
        if path.exists():
            before = _read_config(path)
            # Settings with which nothing was measured bind nobody.
            if (self.path / PIECES).exists():
                _check_unchanged(before, config, self.path)
            models = {**before.models, **config.models}
            earlier = {"models": models, "started": before.started, "seconds": before.seconds}
            config = config.model_copy(update=earlier)
        self.write("config.json", config.model_dump_json(indent=2) + "\n")
        return config

    def close(self, config: RunConfig, seconds: float) -> None:
        """Adds the time of this run to the configuration.

        Raises:
            PopiError: If it cannot be written.
        """
        spent = config.model_copy(update={"seconds": round(config.seconds + seconds, 1)})
        self.write("config.json", spent.model_dump_json(indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder, whole or not at all.

        Raises:
            PopiError: If it cannot be written.
        """
        write_text(self.path / name, text)

    async def piece(
        self, *names: str, model: type[Record], make: Callable[[], Awaitable[list[Record]]]
    ) -> list[Record]:
        """Reads a piece, or makes and keeps it.

        Args:
            names: Where it stands below ``users/``, from the outside in.
            model: What each line holds.
            make: Measures it.

        Raises:
            InputError: If the piece is there and broken.
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
    fix = "name another folder with --out, or remove this one to measure anew"
    check_unchanged(before.settings, now.settings, file=folder, fix=fix)
    # A model that had to be fetched first was not known then.
    both = {name: files for name, files in before.models.items() if files is not None and name in now.models}
    check_unchanged({"models": both}, {"models": {name: now.models[name] for name in both}}, file=folder, fix=fix)


def _file_name(name: str) -> str:
    """A name as a file name; one that has to be changed for it keeps apart from others by a fingerprint."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
