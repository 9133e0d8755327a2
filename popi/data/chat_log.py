"""Chat logs in the format of OpenAI's API: records with ``messages``, each with a ``role`` and a ``content``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field

from popi.data.convert import Conversion, Dropped, check_any, read_records
from popi.data.example import PersonalizationExample
from popi.errors import InputError
from popi.io import BadRows, parse_lines, parse_rows, validate
from popi.signals import Conversation, FileRecord, Id, Speaker, Time, Turn, UserSignals, as_user_id, number_as_text

ORIGIN = "chat"

SPEAKERS = {"user": Speaker.USER, "assistant": Speaker.ASSISTANT}
"""The roles that are converted. Turns of other roles are dropped."""

TEXTS = ("text", "input_text", "output_text")
"""The types of content parts that are converted."""


class _Part(FileRecord):
    model_config = ConfigDict(extra="ignore")

    type: str
    text: str = ""


class _Message(FileRecord):
    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant", "system", "developer", "tool", "function"]
    content: str | list[_Part] = ""


class _Record(FileRecord):
    """A record of a log. Its other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    messages: list[_Message] = Field(min_length=1)
    user_id: Id = ""
    user: Id = ""
    metadata: Any = None
    time: Time = Field(None, validation_alias=AliasChoices("time", "created_at", "created", "timestamp"))

    def named_user(self) -> str:
        """The id of the user, or an empty text."""
        more = self.metadata if isinstance(self.metadata, Mapping) else {}
        ids = (self.user_id, self.user, *(number_as_text(more.get(name)) for name in ("user_id", "user")))
        return next((as_user_id(name) for name in ids if isinstance(name, str) and name.strip()), "")


def convert_chat(path: Path, *, bad_rows: BadRows | None = None) -> Conversion:
    """Converts a chat log. Each record becomes a conversation of the user that it names.

    The user is named in ``user_id``, ``user``, ``metadata.user_id`` or ``metadata.user``, the time in ``time``,
    ``created_at``, ``created`` or ``timestamp``. Only the turns of the user and of the assistant are converted, and of
    their content only the text. A record is dropped if the user says nothing in it, if it repeats another record, or if
    another record continues it, as in logs of requests.

    Args:
        path: One record per line, or a list of records.
        bad_rows: Collects the bad records. Skipped ones are reported as dropped. By default they are an error.

    Raises:
        InputError: If the file is not such a log, or has bad records that are not to be skipped.
    """
    log, bad = _Log(path), bad_rows or BadRows()
    if log.is_list:
        rows = parse_rows(enumerate(read_records(path, of="chats")), log.parse, bad_rows=bad)
    else:
        rows = parse_lines(path, log.parse, bad_rows=bad)
    users: dict[str, dict[int, Conversation]] = {}
    for number, (user_id, turns, time) in rows:
        chats = users.setdefault(user_id, {})
        if turns:
            chats[number] = Conversation(turns=turns, time=time, origin=ORIGIN)
    examples = []
    for user_id, chats in users.items():
        repeated = _repeated(chats)
        for number, reason in repeated.items():
            log.drop(number, reason)
        if signals := tuple(chat for number, chat in chats.items() if number not in repeated):
            examples.append(PersonalizationExample(user=UserSignals(user_id=user_id, signals=signals)))
    fix = "give a log in which users say something"
    check_any(path, examples, log.dropped, what="conversation", fix=fix)
    return Conversion(tuple(examples), tuple(log.dropped))


class _Log:
    """Parses the records of one file and notes what is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_list = _starts_with_list(path)
        self.dropped: list[Dropped] = []

    def drop(self, number: int, reason: str, field: str = "") -> None:
        index, line = (number, None) if self.is_list else (None, number)
        self.dropped.append(Dropped(reason, self.path.name, index, line, field))

    def parse(self, number: int, value: Any) -> tuple[str, tuple[Turn, ...], Any]:
        """The user of a record, the turns (none if the user says nothing) and the time."""
        try:
            record = validate(_Record, value)
            if not (user_id := record.named_user()):
                raise InputError("names no user", fix="give user_id, user, metadata.user_id or metadata.user")
        except InputError as error:
            self.drop(number, error.what, error.field or "")
            line, field = (None, f"{number}.{error.field or ''}".strip(".")) if self.is_list else (number, error.field)
            raise InputError(error.what, file=self.path, line=line, field=field, fix=error.fix) from error
        turns = self._turns(number, record.messages)
        if not any(turn.speaker is Speaker.USER for turn in turns):
            self.drop(number, "the user says nothing in this record")
            return user_id, (), record.time
        return user_id, turns, record.time

    def _turns(self, number: int, messages: Sequence[_Message]) -> tuple[Turn, ...]:
        turns = []
        for place, message in enumerate(messages):
            field = f"messages.{place}"
            if message.role not in SPEAKERS:
                self.drop(number, f"turn of the role {message.role}", field)
                continue
            parts = message.content
            if isinstance(parts, str):
                parts = [_Part(type="text", text=parts)]
            for part_place, part in enumerate(parts):
                if part.type not in TEXTS:
                    self.drop(number, f"content of the type {part.type}", f"{field}.content.{part_place}")
            texts = [part.text for part in parts if part.type in TEXTS and part.text]
            if texts:
                turns.append(Turn(speaker=SPEAKERS[message.role], text="\n".join(texts)))
            else:
                self.drop(number, f"turn of the {message.role} without text", field)
        return tuple(turns)


def _starts_with_list(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as stream:
        return stream.read(4096).decode("utf-8-sig", "replace").lstrip().startswith("[")
    return False


def _repeated(chats: Mapping[int, Conversation]) -> dict[int, str]:
    """The conversations of a user that are contained in others, with the reasons."""
    first: dict[str, int] = {}
    continued = {chat.turns[:length] for chat in chats.values() for length in range(1, len(chat.turns))}
    reasons = {}
    for number, chat in chats.items():
        if first.setdefault(chat.id, number) != number:
            reasons[number] = "repeats an earlier record"
        elif chat.turns in continued:
            reasons[number] = "another record continues this one"
    return reasons
