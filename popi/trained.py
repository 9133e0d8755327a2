"""The training record of a model: its base model and its prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from popi.config import FILES
from popi.errors import ModelError
from popi.io import write_text
from popi.models import folder_of
from popi.prompt_files import read_prompts
from popi.prompts import CUSTOM, DEFAULT, PROMPT_SETS, PromptSet, prompt_set

log = logging.getLogger(__name__)

RECORD = "popi.json"


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a model was trained.

    Attributes:
        made_from: Name of the model that it was made from; ``None`` if it was trained from scratch.
        template_hash: Hash of the prompt templates in training.
        prompts: The name and the templates of a prompt set that is not part of popi.
    """

    made_from: str | None = None
    template_hash: str = ""
    prompts: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, made_from: str, template_hash: str, prompts: PromptSet | None) -> TrainingRecord:
        """The record of a model that was trained with a prompt set, or with another format."""
        if prompts is None or prompts.hash in {known.hash for known in PROMPT_SETS.values()}:
            return cls(made_from, template_hash)
        return cls(made_from, template_hash, {"name": prompts.name, **prompts.templates()})

    def write(self, folder: Path) -> None:
        """Writes the record into the folder of the model.

        Raises:
            PopiError: If it cannot be written.
        """
        record: dict[str, Any] = {"from": self.made_from, "template_hash": self.template_hash}
        if self.prompts is not None:
            record["prompts"] = self.prompts
        write_text(folder / RECORD, json.dumps(record) + "\n")


def training_record(model: str) -> TrainingRecord | None:
    """Reads the record of a model; ``None`` if it has none, or the model is not on this machine.

    Args:
        model: Name of a shipped model, path or hub id. The name of a model on a server has no record.

    Raises:
        ModelError: If the record is malformed.
    """
    try:
        folder = folder_of(model)
    except ModelError:
        return None
    file = None if folder is None else folder / RECORD
    if file is None or not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        made_from, template_hash = record.get("from"), record.get("template_hash", "")
        prompts = record.get("prompts")
        if not (
            isinstance(made_from, str | None) and isinstance(template_hash, str) and isinstance(prompts, Mapping | None)
        ):
            raise ValueError("a field has the wrong type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"malformed training record {file}: {error}", fix="restore the file or remove it") from error
    return TrainingRecord(made_from, template_hash, prompts)


@cache
def warn_of_other_templates(model: str, template_hash: str) -> None:
    """Logs a warning, once, if a model was trained with other templates than those that it is used with.

    Args:
        model: Name of a shipped model, path or hub id.
        template_hash: Hash of the templates that it is used with.

    Raises:
        ModelError: If the record of the model is malformed.
    """
    record = training_record(model)
    if record is not None and record.template_hash not in ("", template_hash):
        message = "%s was trained with prompt templates %s, but is used with %s"
        log.warning(message, model, record.template_hash, template_hash)


def prompts_of(model: str, requested: PromptSet | str | None = None) -> PromptSet:
    """Chooses the prompt set for a model.

    Args:
        model: Name of a shipped model, path or hub id.
        requested: A set, its name, or the path of a YAML file. ``None`` takes the set that the model was trained with,
            else the default.

    Raises:
        InputError: If the requested set is unknown, or its file is wrong.
        ModelError: If the model was trained with templates that this version does not have.
    """
    if isinstance(requested, PromptSet):
        return requested
    if requested is not None:
        return read_prompts(Path(requested)) if requested.endswith(FILES) else prompt_set(requested)
    record = training_record(model)
    if record is None or not record.template_hash:
        return DEFAULT
    if record.prompts is not None:
        return _recorded(record.prompts, model)
    for known in PROMPT_SETS.values():
        if known.hash == record.template_hash:
            return known
    fix = "pass the prompts or the class that it was trained with"
    if not record.template_hash.startswith(CUSTOM):
        fix = "use the version of popi that trained it, train it again, or pass prompts= to override"
    raise ModelError(
        f"{model} was trained with prompt templates {record.template_hash}, which this version does not have", fix=fix
    )


def _recorded(prompts: Mapping[str, Any], model: str) -> PromptSet:
    values = {**prompts, "examples": tuple(map(tuple, prompts.get("examples", ())))}
    try:
        return PromptSet(**values).custom()
    except TypeError as error:
        fix = "restore the file or remove it"
        raise ModelError(f"malformed training record of {model}: {error}", fix=fix) from error
