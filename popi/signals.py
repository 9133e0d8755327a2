"""Signals: what a user has shown of their preferences.

A signal is one observation, of one of seven kinds, each with its time, its origin and who said it. Only what the user
did or said is evidence: the answers that an assistant wrote are what the user reacted *to*, and a text quoted from
somebody else says nothing about the user's taste by itself.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

Text = Annotated[str, Field(min_length=1)]


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

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

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
        if not min(self.worst, self.best) <= self.score <= max(self.worst, self.best):
            raise ValueError(f"score {self.score:g} lies outside the scale {self.worst:g} to {self.best:g}")
        return self


class Edit(_Signal):
    """How the user changed an answer before using it."""

    kind: Literal["edit"] = "edit"
    prompt: Text
    original: Text
    edited: Text


class Statement(_Signal):
    """A preference that was stated in words."""

    kind: Literal["statement"] = "statement"
    text: Text


class Demographics(_Signal):
    """What is known of the user's circumstances, as words: ``{"occupation": "nurse"}``."""

    kind: Literal["demographics"] = "demographics"
    facts: dict[str, str] = Field(min_length=1)


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

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

SIGNAL: TypeAdapter[Signal] = TypeAdapter(Signal)


class UserSignals(BaseModel):
    """One user's signals, oldest first.

    Attributes:
        user_id: Names the user.
        signals: In the order of observation; ids are unique.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: Text
    signals: tuple[Signal, ...] = ()

    @field_validator("signals")
    @classmethod
    def _ids_unique(cls, signals: tuple[Signal, ...]) -> tuple[Signal, ...]:
        seen: set[str] = set()
        for place, signal in enumerate(signals):
            if signal.id in seen:
                raise ValueError(f"signal {place} repeats the id {signal.id!r} (the same signal twice?)")
            seen.add(signal.id)
        return signals

    def add(self, *signals: Signal) -> UserSignals:
        """Returns these signals with more of them at the end; one whose id is known already is left out."""
        known = {signal.id for signal in self.signals}
        new = {signal.id: signal for signal in signals if signal.id not in known}
        return self.model_copy(update={"signals": (*self.signals, *new.values())})

    def digest(self) -> str:
        """A stable fingerprint of the signals: the same content in the same order gives the same 16 hex digits."""
        content: list[dict[str, Any]] = [signal.model_dump(mode="json") for signal in self.signals]
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
