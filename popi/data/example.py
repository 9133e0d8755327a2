"""The shape in which every data set reaches training and evaluation: one user's signals and test pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from popi.errors import InputError, MissingExtra
from popi.io import read_json_lines, validate
from popi.signals import FROZEN, Text, UserSignals


class HeldOutPair(BaseModel):
    """A prompt that the signals do not show, with the answer that the user prefers and the one they do not."""

    model_config = FROZEN

    prompt: Text
    chosen: Text
    rejected: Text

    @model_validator(mode="after")
    def _answers_differ(self) -> HeldOutPair:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text, so the pair cannot test anything")
        return self


class PersonalizationExample(BaseModel):
    """One user: what is seen and what is asked.

    Attributes:
        user: The signals, which is all that a writer may read.
        tests: Pairs that the signals do not show.
        oracles: Summaries that a writer could not know, by name: ``truth`` (the true tastes) and ``evidence`` (the best
            summary given only the signals). Present only where the truth is known.
        facts: What a data set knows beside, for judges: never shown to a writer or a generator. Users of one
            ``cluster``, where it is told, do not witness independently of each other.
    """

    model_config = FROZEN

    user: UserSignals
    tests: tuple[HeldOutPair, ...] = ()
    oracles: dict[str, str] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """What is resampled as a whole when an interval is drawn."""
        return str(self.facts.get("cluster", self.user.user_id))

    @field_validator("facts")
    @classmethod
    def _facts_are_json(cls, facts: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(facts, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot be written as JSON ({error})") from error
        return facts


def read_examples(path: Path) -> Iterator[PersonalizationExample]:
    """Reads examples, in constant memory but for the names of the users.

    Args:
        path: JSON lines, in which a line that holds bare signals is an example without test pairs; or the folder of a
            ``datasets.Dataset`` that popi wrote.

    Raises:
        InputError: If a line is broken or a user appears twice.
        MissingExtra: If a folder is given and ``datasets`` is not installed.
    """
    seen: dict[str, int] = {}
    for number, example in _from_folder(path) if path.is_dir() else _from_lines(path):
        user_id = example.user.user_id
        if user_id in seen:
            raise InputError(
                f"user {user_id!r} stands in line {seen[user_id]} already",
                file=path,
                line=number,
                field="user_id",
                fix="join the two lines into one",
            )
        seen[user_id] = number
        yield example


def _from_lines(path: Path) -> Iterator[tuple[int, PersonalizationExample]]:
    for number, record in read_json_lines(path):
        if isinstance(record, dict) and "user" in record:
            yield number, validate(PersonalizationExample, record, file=path, line=number)
        else:
            yield number, PersonalizationExample(user=validate(UserSignals, record, file=path, line=number))


def _from_folder(path: Path) -> Iterator[tuple[int, PersonalizationExample]]:
    try:
        from popi.data.dataset import load
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", "train") from error
    return enumerate(load(path), start=1)
