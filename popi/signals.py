"""Signals: what a user has shown of their preferences.

A signal is one observation, of one of seven kinds, each with its time, its origin and who said it. Only what the
user did or said is evidence: the answers that an assistant wrote are what the user reacted *to*, and a text quoted
from somebody else says nothing about the user's taste by itself.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from popi.errors import InputError

Text = Annotated[str, Field(min_length=1)]
"""Words: at least one character that is not a space, where the model strips spaces."""

FROZEN = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, allow_inf_nan=False)
"""Immutable; an unknown field is an error; no space around texts; numbers that JSON has."""


class Speaker(StrEnum):
    """Who said a text."""

    USER = "user"
    ASSISTANT = "assistant"
    QUOTED = "quoted"


class _Signal(BaseModel):
    """What all signals share.

    Attributes:
        id: Unique among the signals of a user; made from the content when it is not given.
        time: When it was observed, if known.
        origin: Where it came from: an app, a survey, an import.
        said_by: Whose act or words this signal is. Anything but ``user`` is never evidence of the user's taste.
    """

    model_config = FROZEN

    id: str = ""
    time: datetime | None = None
    origin: str = ""
    said_by: Speaker = Speaker.USER

    @model_validator(mode="after")
    def _name_by_content(self) -> _Signal:
        if not self.id:
            content = json.dumps(self.model_dump(mode="json", exclude={"id"}), sort_keys=True)
            object.__setattr__(self, "id", hashlib.sha256(content.encode()).hexdigest()[:12])
        return self

    @property
    def is_evidence(self) -> bool:
        """Whether this says anything about the user's own taste."""
        return self.said_by is Speaker.USER


class PreferencePair(_Signal):
    """The user preferred one answer to another for the same prompt."""

    kind: Literal["pair"] = "pair"
    prompt: Text
    chosen: Text
    rejected: Text

    @model_validator(mode="after")
    def _answers_differ(self) -> PreferencePair:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text, so nothing was preferred")
        return self


class Comment(_Signal):
    """What the user wrote about a text (an answer, a post); ``about`` is that text, written by somebody else."""

    kind: Literal["comment"] = "comment"
    text: Text
    about: str = ""
    prompt: str = ""


class Rating(_Signal):
    """A score that the user gave to an answer, on a scale from ``worst`` to ``best``."""

    kind: Literal["rating"] = "rating"
    prompt: Text
    response: Text
    score: float
    worst: float = 1.0
    best: float = 5.0

    @model_validator(mode="after")
    def _score_on_scale(self) -> Rating:
        if self.worst == self.best:
            raise ValueError(f"the scale has one point, {self.worst:g}, so the score says nothing")
        if not min(self.worst, self.best) <= self.score <= max(self.worst, self.best):
            raise ValueError(f"score {self.score:g} lies outside the scale {self.worst:g} to {self.best:g}")
        return self


class Edit(_Signal):
    """How the user changed an answer before using it."""

    kind: Literal["edit"] = "edit"
    prompt: Text
    original: Text
    edited: Text

    @model_validator(mode="after")
    def _texts_differ(self) -> Edit:
        if self.original == self.edited:
            raise ValueError("original and edited are the same text, so nothing was changed")
        return self


class Statement(_Signal):
    """A preference that was stated in words."""

    kind: Literal["statement"] = "statement"
    text: Text


class Demographics(_Signal):
    """What is known of the user's circumstances, as words: ``{"occupation": "nurse"}``."""

    kind: Literal["demographics"] = "demographics"
    facts: dict[Text, Text] = Field(min_length=1)


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = FROZEN

    speaker: Speaker
    text: Text


class Conversation(_Signal):
    """A dialogue. Only the turns of the user are evidence."""

    kind: Literal["conversation"] = "conversation"
    turns: tuple[Turn, ...] = Field(min_length=1)

    @property
    def is_evidence(self) -> bool:
        """Whether the user says anything in it."""
        return super().is_evidence and any(turn.speaker is Speaker.USER for turn in self.turns)


Signal = Annotated[
    PreferencePair | Comment | Rating | Edit | Statement | Demographics | Conversation,
    Field(discriminator="kind"),
]
"""Any signal, told apart by ``kind``."""


class UserSignals(BaseModel):
    """One user's signals, oldest first.

    Attributes:
        user_id: Names the user.
        signals: In the order of observation; ids are unique.
    """

    model_config = FROZEN

    user_id: Text
    signals: tuple[Signal, ...] = ()

    @field_validator("signals")
    @classmethod
    def _ids_unique(cls, signals: tuple[Signal, ...]) -> tuple[Signal, ...]:
        seen: dict[str, int] = {}
        for place, signal in enumerate(signals):
            if signal.id in seen:
                raise ValueError(
                    f"signals {seen[signal.id]} and {place} have the same id {signal.id!r} "
                    "(made from the content where none is given): give each its own id or time"
                )
            seen[signal.id] = place
        return signals

    def add(self, *signals: Signal) -> UserSignals:
        """Returns these signals with more of them at the end; one that is known already is not repeated.

        Raises:
            InputError: If the id of a new signal stands for another one.
        """
        known = {signal.id: signal for signal in self.signals}
        for signal in signals:
            if known.setdefault(signal.id, signal) != signal:
                raise InputError(
                    f"user {self.user_id!r} has another signal of the id {signal.id!r}",
                    field="id",
                    fix="give the new one its own",
                )
        return self.model_copy(update={"signals": tuple(known.values())})

    def digest(self) -> str:
        """A stable fingerprint of the signals, 16 hex digits; other content or another order gives others."""
        content: list[dict[str, Any]] = [signal.model_dump(mode="json") for signal in self.signals]
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
