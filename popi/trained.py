"""The training record of a model: its base model and its prompts."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from popi.errors import ModelError
from popi.io import write_text
from popi.models import folder_of
from popi.prompts import CUSTOM, DEFAULT, PROMPT_SETS, PromptSet, prompt_set

log = logging.getLogger(__name__)

FILE = "popi.json"


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a model was trained.

    Attributes:
        made_from: Name of the model that it was made from; ``None`` if it was trained from scratch.
        template_hash: Hash of the prompt templates in training.
    """

    made_from: str | None = None
    template_hash: str = ""

    def write(self, folder: Path) -> None:
        """Writes the record into the folder of the model.

        Raises:
            PopiError: If it cannot be written.
        """
        record = {"from": self.made_from, "template_hash": self.template_hash}
        write_text(folder / FILE, json.dumps(record) + "\n")


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
    file = None if folder is None else folder / FILE
    if file is None or not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        made_from, template_hash = record.get("from"), record.get("template_hash", "")
        if not (isinstance(made_from, str | None) and isinstance(template_hash, str)):
            raise ValueError("a field has the wrong type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"malformed training record {file}: {error}", fix="restore the file or remove it") from error
    return TrainingRecord(made_from, template_hash)


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
        requested: A set, or its name. ``None`` takes the set that the model was trained with, else the default.

    Raises:
        ConfigError: If the requested set is unknown.
        ModelError: If the model was trained with templates that this version does not have.
    """
    if isinstance(requested, PromptSet):
        return requested
    if requested is not None:
        return prompt_set(requested)
    record = training_record(model)
    if record is None or not record.template_hash:
        return DEFAULT
    for known in PROMPT_SETS.values():
        if known.hash == record.template_hash:
            return known
    fix = "pass the prompts or the class that it was trained with"
    if not record.template_hash.startswith(CUSTOM):
        fix = "use the version of popi that trained it, train it again, or pass prompts= to override"
    raise ModelError(
        f"{model} was trained with prompt templates {record.template_hash}, which this version does not have", fix=fix
    )
