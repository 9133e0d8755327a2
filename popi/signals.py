"""Signals: observations of a user's preferences.

A signal is one observation of one of seven kinds, with its time, its origin and its speaker. Only what the user did or
said is evidence of their preferences. The user reacts to the responses of an assistant, and a text quoted from another
person says nothing about the user's preferences by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, date, datetime
from enum import StrEnum
from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from popi.errors import InputError
from popi.io import MISREAD

EXACT = 2**53
"""Whole numbers below this are exact as floating-point numbers."""

UNIX_SECONDS = tuple(datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (1990, 2100))
"""The range in which a number is read as a Unix time. Spreadsheet dates and numbers like 20240501 are outside it."""

INVISIBLE = re.compile(r"^[\s\ufeff\u200b\u2060]+|[\s\ufeff\u200b\u2060]+$")
"""White space, byte order marks and characters without width around an id."""

MISSING = frozenset(("NaN", "nan", "NaT", "<NA>", "None", "null", "NULL"))
"""How programs write "not given" into cells of tables."""

WRITE_TIMES = "write times in ISO 8601, like 2024-05-01T12:00:00Z"


def number_as_text(value: object) -> object:
    """Turns a whole number into text: 7 and 7.0, as pandas writes ids, become "7". Other values are unchanged."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value))
    return value


def _as_id(value: object) -> object:
    """Makes ids that look the same equal: whole numbers and their text, composed and decomposed characters."""
    value = number_as_text(value)
    return INVISIBLE.sub("", unicodedata.normalize("NFC", value)) if isinstance(value, str) else value


def _is_missing(value: object) -> bool:
    """Whether a value means "not given": ``None``, NaN, or NaT and NA of pandas."""
    pandas = type(value).__name__ in ("NaTType", "NAType")
    return value is None or pandas or (isinstance(value, float) and value != value)


def without_missing(value: object) -> object:
    """Drops the entries of a dictionary that mean "not given"."""
    if isinstance(value, Mapping):
        return {name: item for name, item in value.items() if type(item) is str or not _is_missing(item)}
    return value


def _as_time(value: object) -> object:
    """Reads ISO 8601 or Unix time (seconds or milliseconds). A time without a zone is in UTC. Empty text is no time.

    Raises:
        ValueError: If the value is not a time, or could mean several.
    """
    if isinstance(value, str):
        text = value.strip()
        if not text or text in MISSING:
            return None
        value = float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?", text) else _iso_time(text)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, float | Integral) and not isinstance(value, bool):
        value = _unix_time(value if isinstance(value, float) else int(value))
    if not isinstance(value, datetime):
        return value
    try:
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError("the time is outside the years 1 to 9999") from error


def _iso_time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} is not a time; {WRITE_TIMES}") from error


def _unix_time(number: float) -> datetime:
    first, last = UNIX_SECONDS
    for unit in (1, 1000):
        if first * unit <= number < last * unit:
            return datetime.fromtimestamp(number / unit, UTC)
    raise ValueError(
        f"the number {str(number)[:40].removesuffix('.0')} is not a Unix time from 1990 to 2100 in seconds or "
        f"milliseconds, but may be a spreadsheet date; {WRITE_TIMES}"
    )


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, not {str(value).lower()}")
    return value


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""Text with at least one character that is not white space. Surrounding white space is removed."""

Id = Annotated[str, BeforeValidator(_as_id)]
"""An id, possibly empty. Whole numbers become text, and surrounding white space is removed."""

UserId = Annotated[Text, BeforeValidator(_as_id)]
"""The id of a user. Every field and argument that names a user has this type, so that ``"ann "`` is ``"ann"``."""

Fact = Annotated[Text, BeforeValidator(number_as_text)]
"""Text that may be given as a whole number."""

Time = Annotated[datetime | None, BeforeValidator(_as_time)]
"""A time in UTC, given in ISO 8601 or as an unambiguous Unix time; ``None`` if it is not given."""

Number = Annotated[float, BeforeValidator(_not_bool)]
"""A number, but not true or false."""

FROZEN = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, allow_inf_nan=False)
"""Immutable, without unknown fields, without white space around texts, and with numbers that JSON can represent."""

_USER_ID: TypeAdapter[str] = TypeAdapter(UserId)


def as_user_id(value: object) -> str:
    """Normalizes the id of a user, as every model does that has one.

    Example:
        >>> as_user_id(" ann "), as_user_id(7.0)
        ('ann', '7')

    Raises:
        InputError: If it is not an id.
    """
    try:
        return _USER_ID.validate_python(value)
    except ValidationError as error:
        what = f"{value!r} is not the id of a user" if str(value).strip() else "the id of the user is empty"
        raise InputError(what, field="user_id", fix="give it as text") from error


class FileRecord(BaseModel):
    """Base class of everything that is read from users' files. A field that is null or NaN counts as not given."""

    model_config = FROZEN

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, record: object) -> object:
        return without_missing(record)


class Speaker(StrEnum):
    """Who said a text."""

    USER = "user"
    ASSISTANT = "assistant"
    QUOTED = "quoted"


class _Signal(FileRecord):
    """Base class of the signals.

    Attributes:
        id: Unique among the signals of a user. Derived from the content if it is not given.
        time: When it was observed, in UTC, if known.
        origin: Where it comes from: an app, a survey, an import.
        said_by: The person who acted or wrote. Only ``user`` is evidence of the user's preferences.
    """

    id: Id = ""
    time: Time = None
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
        """Whether this is evidence of the user's own preferences."""
        return self.said_by is Speaker.USER


class PreferencePair(_Signal):
    """The user preferred one response to another for the same prompt.

    Example:
        >>> pair = PreferencePair(prompt="How do magnets work?", chosen="Poles attract.", rejected="Well, ...")
        >>> pair.kind, pair.is_evidence
        ('pair', True)
    """

    kind: Literal["pair"] = "pair"
    prompt: Text
    chosen: Text
    rejected: Text

    @model_validator(mode="after")
    def _responses_differ(self) -> PreferencePair:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text")
        return self


class Comment(_Signal):
    """A comment of the user on a text by another person.

    Example:
        >>> comment = Comment(text="Too long.", about="Well, there is a lot to say about magnets.")
        >>> comment.text, comment.said_by.value
        ('Too long.', 'user')

    Attributes:
        text: The words of the user.
        about: The text that the user comments on: a response, a post.
        prompt: The prompt that ``about`` responds to.
    """

    kind: Literal["comment"] = "comment"
    text: Text
    about: str = ""
    prompt: str = ""


class Rating(_Signal):
    """A score that the user gave to a response.

    Example:
        >>> rating = Rating(prompt="How do magnets work?", response="Poles attract.", score=9, worst=1, best=10)
        >>> rating.score, rating.best
        (9.0, 10.0)

    Attributes:
        prompt: The prompt.
        response: The response.
        score: The score. It need not be a whole number.
        worst: The lowest rank of the scale.
        best: The highest rank of the scale, possibly a smaller number than ``worst``. A scale other than 1 to 5 must be
            given: a score of 4 on a scale to 10 cannot be recognized as such.
    """

    kind: Literal["rating"] = "rating"
    prompt: Text
    response: Text
    score: Number
    worst: Number = 1.0
    best: Number = 5.0

    @model_validator(mode="after")
    def _score_on_scale(self) -> Rating:
        given = self.model_fields_set
        low, high = sorted((self.worst, self.best))
        if "best" not in given and (self.worst != 1 or not low <= self.score <= high):
            what = f"score {self.score:g} is outside the default scale 1 to 5"
            if self.worst != 1:
                what = f"worst is {self.worst:g}, but best is not given"
            fix = "give best, and worst if it is not 1, in every rating of the file"
            raise PydanticCustomError(MISREAD, "{what}; {fix}", {"what": what, "fix": fix})
        if "worst" not in given and self.best <= self.worst:
            raise ValueError(f"best is {self.best:g}, but worst is not given")
        if self.worst == self.best:
            raise ValueError(f"worst and best are both {self.worst:g}")
        if not low <= self.score <= high:
            raise ValueError(f"score {self.score:g} is outside the scale {self.worst:g} to {self.best:g}")
        return self


class Edit(_Signal):
    """A response that the user changed before using it.

    Example:
        >>> edit = Edit(prompt="What is tea?", original="Tea is a drink, of course!", edited="Tea is a drink.")
        >>> edit.edited
        'Tea is a drink.'
    """

    kind: Literal["edit"] = "edit"
    prompt: Text
    original: Text
    edited: Text

    @model_validator(mode="after")
    def _texts_differ(self) -> Edit:
        if self.original == self.edited:
            raise ValueError("original and edited are the same text")
        return self


class Statement(_Signal):
    """A preference that the user stated in words.

    Example:
        >>> statement = Statement(text="I like short answers.", time="2024-05-01T12:00:00Z")
        >>> statement.text, statement.time.year
        ('I like short answers.', 2024)
    """

    kind: Literal["statement"] = "statement"
    text: Text


class Demographics(_Signal):
    """Facts about the user, as words: ``{"occupation": "nurse"}``.

    Example:
        >>> Demographics(facts={"occupation": "nurse", "age": 41}).facts
        {'occupation': 'nurse', 'age': '41'}
    """

    kind: Literal["demographics"] = "demographics"
    facts: Annotated[dict[Text, Fact], BeforeValidator(without_missing), Field(min_length=1)]


class Turn(FileRecord):
    """One turn of a conversation.

    Example:
        >>> turn = Turn(speaker="user", text="Shorter, please.")
        >>> turn.speaker is Speaker.USER
        True
    """

    speaker: Speaker
    text: Text


class Conversation(_Signal):
    """A dialogue. Only the turns of the user are evidence.

    Example:
        >>> answer = Turn(speaker="assistant", text="Well, there is a lot to say about magnets.")
        >>> conversation = Conversation(turns=(answer, Turn(speaker="user", text="Shorter, please.")))
        >>> conversation.is_evidence
        True
    """

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
"""Any signal. The field ``kind`` says which."""


class UserSignals(FileRecord):
    """The signals of one user.

    Example:
        >>> user = UserSignals(user_id="ann", signals=(Statement(text="I like short answers."),))
        >>> user = user.add(Comment(text="Too long.", about="Well, there is a lot to say."))
        >>> [signal.kind for signal in user.signals]
        ['statement', 'comment']

    Attributes:
        user_id: The id of the user.
        signals: The signals in the order in which they were given. Their ids are unique.
    """

    user_id: UserId
    signals: tuple[Signal, ...] = ()

    @field_validator("signals")
    @classmethod
    def _ids_unique(cls, signals: tuple[Signal, ...]) -> tuple[Signal, ...]:
        seen: dict[str, int] = {}
        for place, signal in enumerate(signals):
            if signal.id in seen:
                raise ValueError(
                    f"signals {seen[signal.id]} and {place} have the same id {signal.id!r} "
                    "(derived from the content if not given); give each its own id or time"
                )
            seen[signal.id] = place
        return signals

    def chronological(self) -> tuple[Signal, ...]:
        """The signals, oldest first.

        They are sorted by time if every signal has one; signals of the same time stay in the given order. Otherwise the
        given order is taken to be the order of observation.
        """
        times = {signal.id: signal.time for signal in self.signals if signal.time is not None}
        if len(times) < len(self.signals):
            return self.signals
        return tuple(sorted(self.signals, key=lambda signal: times[signal.id]))

    def add(self, *signals: Signal) -> UserSignals:
        """Returns these signals with more at the end. A signal that is already present is not repeated.

        Raises:
            InputError: If a new signal has the id of a different one.
        """
        known = {signal.id: signal for signal in self.signals}
        for signal in signals:
            if known.setdefault(signal.id, signal) != signal:
                raise InputError(
                    f"user {self.user_id!r} already has a different signal with the id {signal.id!r}",
                    field="id",
                    fix="give the new signal a different id",
                )
        return self.model_copy(update={"signals": tuple(known.values())})

    def digest(self) -> str:
        """A fingerprint of the signals, 16 hex digits. It depends on their content and their order."""
        content: list[dict[str, Any]] = [signal.model_dump(mode="json") for signal in self.signals]
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
